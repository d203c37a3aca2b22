"""Gene usage and constants of the simulator, fitted to 319,124 real pairs.

Written by `python benchmarks/simulate.py --calibrate pairs.parquet`; how each number is derived
stands in `benchmarks/calibrate_simulator.py`. The pairs are those of donor 3 of Jaffe et al. 2022.
V and J usage are counts of pairs, D usage is what explains the CDRH3; the other names are the
fields of `SimulationParams`.
"""

from typing import Any

# fmt: off
V_USAGE = {
    "IGH": {
        "IGHV1-18": 6390, "IGHV1-2": 11679, "IGHV1-24": 1561, "IGHV1-3": 4126, "IGHV1-45": 96,
        "IGHV1-46": 9674, "IGHV1-58": 917, "IGHV1-69": 20006, "IGHV1-69-2": 1589, "IGHV1-8": 3438,
        "IGHV2-26": 1574, "IGHV2-5": 9314, "IGHV2-70": 2724, "IGHV2-70D": 7, "IGHV3-11": 4163,
        "IGHV3-13": 860, "IGHV3-15": 4711, "IGHV3-20": 613, "IGHV3-21": 8088, "IGHV3-23": 29672,
        "IGHV3-30": 23413, "IGHV3-33": 87, "IGHV3-35": 4, "IGHV3-43": 677, "IGHV3-43D": 2915,
        "IGHV3-48": 17245, "IGHV3-49": 8348, "IGHV3-53": 2361, "IGHV3-64": 1057, "IGHV3-64D": 15,
        "IGHV3-66": 3476, "IGHV3-69-1": 83, "IGHV3-7": 10376, "IGHV3-72": 1404, "IGHV3-73": 1818,
        "IGHV3-74": 7394, "IGHV3-9": 7190, "IGHV3-NL1": 79, "IGHV4-28": 27, "IGHV4-30-2": 2035,
        "IGHV4-30-4": 38, "IGHV4-31": 3, "IGHV4-34": 13057, "IGHV4-38-2": 18723, "IGHV4-39": 13231,
        "IGHV4-4": 10002, "IGHV4-59": 14656, "IGHV4-61": 16271, "IGHV5-10-1": 1, "IGHV5-51": 13894,
        "IGHV6-1": 1539, "IGHV7-4-1": 6503,
    },
    "IGK": {
        "IGKV1-12": 4713, "IGKV1-16": 2088, "IGKV1-17": 2439, "IGKV1-27": 2624, "IGKV1-39": 28292,
        "IGKV1-5": 15231, "IGKV1-6": 1161, "IGKV1-8": 6596, "IGKV1-9": 4835, "IGKV1-NL1": 1973,
        "IGKV1D-13": 3085, "IGKV1D-16": 305, "IGKV1D-33": 10229, "IGKV1D-8": 1831, "IGKV2-24": 1263,
        "IGKV2-28": 7549, "IGKV2-29": 2038, "IGKV2-30": 4510, "IGKV2D-29": 1414, "IGKV2D-30": 55,
        "IGKV2D-40": 487, "IGKV3-11": 18427, "IGKV3-15": 19664, "IGKV3-20": 29902, "IGKV3D-11": 53,
        "IGKV3D-15": 171, "IGKV3D-20": 432, "IGKV3D-7": 26, "IGKV4-1": 20179, "IGKV5-2": 78,
        "IGKV6-21": 537, "IGKV6D-21": 602, "IGKV6D-41": 10,
    },
    "IGL": {
        "IGLV1-36": 841, "IGLV1-40": 13007, "IGLV1-44": 4190, "IGLV1-47": 6464, "IGLV1-50": 1,
        "IGLV1-51": 10539, "IGLV10-54": 376, "IGLV2-11": 5635, "IGLV2-14": 17364, "IGLV2-18": 597,
        "IGLV2-23": 7709, "IGLV2-8": 6431, "IGLV3-1": 11484, "IGLV3-10": 1957, "IGLV3-12": 1,
        "IGLV3-16": 56, "IGLV3-19": 8426, "IGLV3-21": 10301, "IGLV3-22": 49, "IGLV3-25": 8041,
        "IGLV3-27": 457, "IGLV3-9": 1447, "IGLV4-60": 349, "IGLV4-69": 2844, "IGLV5-37": 92,
        "IGLV5-39": 89, "IGLV5-45": 613, "IGLV5-48": 14, "IGLV5-52": 16, "IGLV6-57": 2692,
        "IGLV7-43": 1353, "IGLV7-46": 1515, "IGLV8-61": 1375,
    },
}
J_USAGE = {
    "IGH": {
        "IGHJ1": 9903, "IGHJ2": 11741, "IGHJ3": 56878, "IGHJ4": 150359, "IGHJ5": 38123,
        "IGHJ6": 52120,
    },
    "IGK": {
        "IGKJ1": 54999, "IGKJ2": 48485, "IGKJ3": 19289, "IGKJ4": 49622, "IGKJ5": 20409,
    },
    "IGL": {
        "IGLJ1": 24761, "IGLJ2": 67511, "IGLJ3": 31284, "IGLJ4": 21, "IGLJ5": 59, "IGLJ6": 999,
        "IGLJ7": 1685,
    },
}
D_USAGE = {
    "IGHD1-1": 0.0015, "IGHD1-14": 0.0003, "IGHD1-20": 0.0207, "IGHD1-26": 0.0134,
    "IGHD1-7": 0.0097, "IGHD2-15": 0.0819, "IGHD2-2": 0.0541, "IGHD2-21": 0.01, "IGHD2-8": 0.0068,
    "IGHD3-10": 0.0653, "IGHD3-16": 0.04, "IGHD3-22": 0.0635, "IGHD3-3": 0.0448, "IGHD3-9": 0.0606,
    "IGHD4-17": 0.2318, "IGHD4-23": 0.0038, "IGHD4-4": 0.0192, "IGHD5-12": 0.0225,
    "IGHD5-18": 0.0054, "IGHD5-24": 0.0118, "IGHD5-5": 0.0159, "IGHD6-13": 0.0806,
    "IGHD6-19": 0.0784, "IGHD6-25": 0.0207, "IGHD6-6": 0.0163, "IGHD7-27": 0.0207,
}
KAPPA_SHARE = 0.6042
MEMORY_SHARE = 0.2381
LOAD = (34.622, 3.044)
NAIVE_LOAD = 0.1353
LIGHT_LOAD = (0.6571, 6.298)
SURVIVAL = {
    "heavy": (0.2584, 0.7691, 0.4719, 1.0, 0.4798, 0.8846, 0.3417),
    "light": (0.229, 0.9284, 0.4023, 1.0, 0.2955, 0.9642, 0.319),
}
MEMORY_CDRH3_SELECTION = 0.1796
JUNCTIONS: dict[str, dict[str, Any]] = {
    "IGH": {
        "v_trim": (1.298, 1.697), "j_trim": (4.341, 2.146), "n1": (6.772, 4.43),
        "d5_trim": (2.967, 1.998), "d3_trim": (2.967, 1.998), "n2": (6.772, 4.43),
        "cdr3_length": (4, 40),
    },
    "IGK": {
        "v_trim": (2.004, 13.262), "j_trim": (1.401, 14.674), "n1": (0.9, 0.224),
        "cdr3_length": (4, 21),
    },
    "IGL": {
        "v_trim": (2.156, 10.809), "j_trim": (1.206, 12.775), "n1": (1.149, 0.383),
        "cdr3_length": (4, 21),
    },
}
