#!/usr/bin/env python3
"""Writes the data files beside it, with the libraries that write such files in practice: python3 make.py

Needs numpy, h5py and safetensors (PyPI). The files are part of the repository, so that the tests need neither.
"""
import pathlib
import zipfile

import h5py
import numpy
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).resolve().parent

weights = {
    "layer1.weight": numpy.arange(6, dtype=numpy.float32).reshape(2, 3) / 4,
    "layer1.bias": numpy.array([-1.5, 0.25, 65504], dtype=numpy.float16),
    "embedding": numpy.linspace(-1, 1, 4096, dtype=numpy.float32).reshape(64, 64),
    "step": numpy.array(1000, dtype=numpy.int64),
}
save_file(weights, HERE / "weights.safetensors", metadata={"format": "np"})

with h5py.File(HERE / "weights.h5", "w", libver=("earliest", "v108")) as file:  # as Keras nests layers
    file.create_dataset("dense/kernel", data=numpy.arange(6, dtype=numpy.float32).reshape(2, 3) / 4)
    file.create_dataset("dense/bias", data=numpy.array([-1.5, 0.25, 3], dtype=numpy.float32))
    file.create_dataset("conv/kernel", data=numpy.linspace(-1, 1, 512, dtype=numpy.float32).reshape(8, 64),
                        chunks=(8, 16), compression="gzip")
    file.attrs["epoch"] = 12

arrays = {"x": numpy.arange(5, dtype=numpy.int64), "y": numpy.eye(3), "names": numpy.array(["a", "b"])}
numpy.savez(HERE / "arrays.npz", **arrays)

with zipfile.ZipFile(HERE / "mixed.zip", "w") as archive:  # stored, deflated, a directory, and a comment
    archive.writestr("config.json", '{"epochs": 3}\n')
    archive.writestr("logs/", "")
    archive.writestr("logs/train.txt", "loss 0.5\n" * 500, compress_type=zipfile.ZIP_DEFLATED)
    archive.comment = b"made by zipfile"
