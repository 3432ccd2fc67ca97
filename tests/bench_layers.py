"""Layers for the tests of bench: two small ones, and the sizes of KernelBench's problems."""

from __future__ import annotations

SMALL = [
    {"name": "net/up1", "N": 2, "C_in": 8, "H": 9, "W": 9, "C_out": 8, "kernel": [3, 5]},
    {
        "name": "net/up2",
        "N": 1,
        "C_in": 4,
        "H": 5,
        "W": 6,
        "C_out": 4,
        "kernel": 4,
        "stride": 2,
        "padding": [1, 1],
        "groups": 2,
        "bias": True,
        "source": "a paper",
    },
]

# problem: (input, weight, stride, padding, dilation, groups, output); the outputs by
# H_out = (H - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1, worked out by hand
KERNELBENCH = {
    57: ((8, 64, 1024, 1024), (64, 64, 3, 3), (1, 1), (0, 0), (1, 1), 1, (8, 64, 1026, 1026)),
    65: ((8, 64, 512, 512), (64, 64, 3, 7), (1, 1), (0, 0), (1, 1), 1, (8, 64, 514, 518)),
    69: ((64, 64, 128, 256), (64, 128, 3, 5), (1, 1), (0, 0), (1, 1), 1, (64, 128, 130, 260)),
    71: ((8, 32, 512, 1024), (32, 32, 3, 3), (1, 1), (0, 0), (1, 1), 1, (8, 32, 514, 1026)),
    75: ((16, 32, 128, 256), (32, 16, 3, 5), (2, 3), (1, 2), (2, 1), 4, (16, 64, 257, 766)),
    78: ((8, 32, 512, 1024), (32, 32, 3, 7), (1, 1), (1, 3), (1, 1), 1, (8, 32, 512, 1024)),
    81: ((16, 32, 64, 128), (32, 64, 3, 3), (5, 5), (1, 1), (2, 2), 1, (16, 64, 318, 638)),
}
