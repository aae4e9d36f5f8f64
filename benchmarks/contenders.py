"""Who takes part in `benchmarks.peers`, what each needs, and how each makes its file of the same weights."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measured_process import Cost, load_cost, run_measured, save_cost
from benchmarks.peer_made import Made, made_gguf, made_onnx
from fastvlm_convert.manifest import load_manifest

INSTALL = "pip install -c constraints.txt 'fastvlm-convert[peers]', which compiles llama.cpp"
RECIPES = ("int4", "int4-fast", "android-int4", "int8")


@dataclass(frozen=True)
class Contender:
    """One way to run the same text decoder.

    Attributes:
        name: As tables call it.
        kind: The engine that runs it, one of `peer_engines.KINDS`.
        asked: What its maker is asked for: a recipe, options of a builder, a file type.
        needs: Modules that must be installed.
    """

    name: str
    kind: str
    asked: str
    needs: tuple[str, ...]

    @property
    def is_ours(self) -> bool:
        """Whether it is a bundle of this tool."""
        return self.kind == "bundle"

    @property
    def not_run(self) -> str | None:
        """Why it cannot run here, and what would let it."""
        missing = [module for module in self.needs if find_spec(module) is None]
        return f"{', '.join(missing)} missing; {INSTALL}" if missing else None


GENAI = ("onnxruntime_genai", "onnx_ir", "transformers", "torch")
PEERS = (
    Contender("genai b32", "genai", "block_size=32", GENAI),
    Contender("genai b128", "genai", "block_size=128", GENAI),
    Contender("llama.cpp Q4_0", "llama", "Q4_0", ("llama_cpp", "gguf")),
    Contender("llama.cpp Q4_K_M", "llama", "Q4_K_M", ("llama_cpp", "gguf")),
    Contender("torch", "torch", "float32", ("torch", "transformers")),
)


def contenders(names: Sequence[str] | None = None) -> list[Contender]:
    """All of them, or those of some names, in the order of tables.

    Raises:
        SystemExit: There is none of such a name.
    """
    ours = tuple(Contender(recipe, "bundle", f"recipe {recipe}", ("onnxruntime",)) for recipe in RECIPES)
    known = {contender.name: contender for contender in (*ours, *PEERS)}
    unknown = set(names or ()) - set(known)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return [contender for contender in known.values() if names is None or contender.name in names]


@dataclass(frozen=True)
class Workshop:
    """Where files are made; what is there already is used again.

    Attributes:
        checkpoint: The FastVLM checkpoint.
        folder: Where everything is written.
        calibration: Pictures with questions for our recipes' solvers; None has them do without, as peers do.
    """

    checkpoint: Path
    folder: Path
    calibration: Path | None = None

    def make(self, contender: Contender) -> tuple[Path, Cost]:
        """Make a contender's file, and say what that took."""
        path = self.folder / contender.name.replace(" ", "-")
        cost = self.folder / f"{path.name}.cost.json"
        if contender.kind == "torch":
            path = self.qwen2()
        elif not cost.exists():
            save_cost(cost, self._made(contender, path))
        return path, Cost(0, 0, 0) if contender.kind == "torch" else load_cost(cost)

    def _made(self, contender: Contender, path: Path) -> Cost:
        if contender.kind == "bundle":
            return self._bundle(contender.name, path)
        if contender.kind == "llama":
            command = [sys.executable, "-m", "benchmarks.gguf_checkpoint", self.gguf(), path]
            return run_measured([*command, "--quantize", contender.asked])[0]
        module = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", self.qwen2(), "-o", path]
        options = ["-p", "int4", "-e", "cpu", "-c", self.folder / "cache"]
        return run_measured([*module, *options, "--extra_options", contender.asked])[0]

    def _bundle(self, name: str, path: Path) -> Cost:
        command = [sys.executable, "-m", "fastvlm_convert", "export", self.checkpoint, "--target", "onnx"]
        data = ["--calibration", self.calibration or "none"]
        return run_measured([*command, "--recipe", name, "--no-cache", "-o", path, *data])[0]

    def qwen2(self) -> Path:
        """The decoder in transformers' form."""
        return self._converted("qwen2", "benchmarks.text_checkpoint")

    def gguf(self) -> Path:
        """The decoder as GGUF in float16."""
        return self._converted("float16.gguf", "benchmarks.gguf_checkpoint")

    def forget_floats(self) -> None:
        """Remove the float GGUF, which only quantizing needs."""
        (self.folder / "float16.gguf").unlink(missing_ok=True)

    def _converted(self, name: str, module: str) -> Path:
        path = self.folder / name
        if not path.exists():
            partial = self.folder / f"{name}.partial"
            if partial.is_dir():
                shutil.rmtree(partial)
            run_measured([sys.executable, "-m", module, self.checkpoint, partial])
            partial.rename(path)
        return path


def made(contender: Contender, path: Path) -> Made:
    """What is really in a contender's file."""
    if contender.is_ours:
        manifest = load_manifest(path)
        artifacts = [manifest.artifact("onnx", part) for part in ("decoder", "embed")]
        return made_onnx([path / artifact.files[0] for artifact in artifacts])
    if contender.kind == "genai":
        return made_onnx([path / "model.onnx"])
    if contender.kind == "llama":
        return made_gguf(path)
    return Made({}, "float32 when run", (path / "model.safetensors").stat().st_size)
