"""Run a Core ML package on any machine. Usable alone: needs numpy, torch and coremltools' file format.

    from fastvlm_convert.mil.interpreter import Interpreter

    interpreter = Interpreter("model.mlpackage")
    outputs = interpreter.run({"x": np.zeros((1, 3), np.float32)})

It checks the stored program and the stored weights, not Apple's kernels. The files: `package` (the folder),
`blob` (the weights in it), `values` and `description` (the protobuf as plain data), `constants` (weights
decoded on demand), `plan` and `memory` (a function as a list of `steps`), `ops` (one function an operation),
`inputs` and `interpreter`.
"""
