import numpy as np
import torch

from fastvlm_convert.weights.lora import LowRank, merge_low_rank
from fastvlm_convert.weights.source import Weight, transposed


def memory(tensor):
    array = tensor.numpy()
    return Weight(array.shape, "float16", lambda start, stop: array[start:stop])


def test_only_the_rows_that_are_asked_for_are_merged_and_the_source_stays():
    rng = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*shape, generator=rng) for shape in ((6, 4), (2, 4), (6, 2)))
    original = w.clone()
    asked = []
    source = memory(w)
    weight = Weight(source.shape, source.dtype, lambda s, e: (asked.append((s, e)), source.read(s, e))[1])
    merged = merge_low_rank(weight, LowRank(up=memory(b), down=memory(a), scale=0.5))
    assert (merged.shape, merged.dtype, asked) == ((6, 4), "float16", [])
    rows = merged.read(1, 4)
    assert asked == [(1, 4)]
    torch.testing.assert_close(torch.from_numpy(rows), (w + 0.5 * b @ a)[1:4])
    merged.array()
    torch.testing.assert_close(w, original, rtol=0, atol=0)


def test_transposed_halves_and_kernels_of_1x1():
    rng = torch.Generator().manual_seed(1)
    w, a, b = (torch.randn(*shape, generator=rng) for shape in ((6, 4), (2, 6), (4, 2)))
    embedding = merge_low_rank(memory(w), LowRank(transposed(memory(a)), transposed(memory(b)), scale=2.0))
    torch.testing.assert_close(torch.from_numpy(embedding.array()), w + 2 * (b @ a).T)
    np.testing.assert_array_equal(embedding.read(2, 5), embedding.array()[2:5])
    kernel = merge_low_rank(memory(w.reshape(6, 4, 1, 1)), LowRank(memory(a.T), memory(b.T), scale=1.0))
    torch.testing.assert_close(torch.from_numpy(kernel.array()), (w + a.T @ b.T).reshape(6, 4, 1, 1))
