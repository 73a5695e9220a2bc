"""Leave Python: the model as a graph of plain operations, for other runtimes, with a proof that it agrees with float64.

    from export.build import build
    from export.verify import verify
    build("models/demo", ["onnx", "torchscript"], "out")
    verify("out")
"""
