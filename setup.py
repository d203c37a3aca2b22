"""Packaging of moe_ablm; pyproject.toml holds the settings of ruff, mypy and pytest."""

from pathlib import Path

from setuptools import find_packages, setup

JAX = ">=0.10.1,<0.13"

setup(
    name="moe_ablm",
    version="0.1.0",
    description="Train, scale and dissect mixture-of-experts antibody language models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["moe_ablm", "moe_ablm.*", "configs", "launch", "sweeps"]),
    package_data={
        "moe_ablm": ["py.typed"],
        "moe_ablm.data": ["germlines/human/*"],
        "moe_ablm.interop": ["hub/*.py"],
    },
    entry_points={"console_scripts": ["moe-ablm = moe_ablm.__main__:console"]},
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.5,<0.13",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.11.30,<0.13",
        "grain>=0.2.15,<0.3",
        "ml_collections>=1.1,<2",
        "absl-py>=2.1,<3",
        "tensorboard>=2.19,<3",
        "numpy>=2.0,<3",
        "scipy>=1.14,<2",
        "pyarrow>=18,<27",
        "safetensors>=0.5,<1",
        # has wheels for these alone; elsewhere moe_ablm.data.semiglobal aligns in NumPy
        "parasail>=1.3.4,<2; platform_machine == 'x86_64' or platform_machine == 'AMD64'",
        "matplotlib>=3.9,<4",
        "rich>=13.9,<16",
        "pyyaml>=6,<7",
    ],
    extras_require={
        # jax for the hardware of a machine, one of them
        "cuda12": [f"jax[cuda12]{JAX}"],
        "cuda13": [f"jax[cuda13]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        "test": [
            "pytest>=8.3,<10",
            "pytest-xdist>=3.7,<4",
            "hypothesis>=6.120,<7",
            "ruff>=0.14,<1",
            "mypy>=1.18,<3",
            "types-PyYAML",
        ],
        "eval": ["scikit-learn>=1.6,<2", "umap-learn>=0.5.7,<1", "seaborn>=0.13.2,<1"],
        # trackers of experiments (`log.tracker`), one of them
        "wandb": ["wandb>=0.31,<1"],
        "trackio": ["trackio>=0.43,<1"],
        "mlflow": ["mlflow-skinny>=3.17,<4"],
        "stores": ["s3fs>=2025.5", "gcsfs>=2025.5"],  # drivers of `s3://` and `gs://`
        "hf": ["torch>=2.6,<=2.13.0", "transformers>=5.0,<6"],
        "aot": [  # compilers for TPUs and GPUs that are not here; versions follow jax's
            "jax[tpu,cuda12-local]",
            "nvidia-cudnn-cu12>=9.8,<10",
            "nvidia-cuda-nvcc-cu12>=12.6.85,<13",
        ],
        "completion": ["argcomplete>=3.5,<4"],
        "hub": ["huggingface_hub>=1.0,<3"],
        "anndata": ["anndata>=0.12,<1"],
        "olga": ["olga>=1.2.4,<2"],
        "app": ["panel>=1.8,<2"],  # the page of `moe-ablm app`
        "notebooks": ["nbclient>=0.10,<1", "nbformat>=5.10,<6", "ipykernel>=6.29,<8"],
        # the site of docs/, whose signatures ruff sets; a driver of the Chromium that looks at it
        # and at the page of app
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2", "ruff>=0.14,<1"],
        "browser": ["playwright>=1.50,<2"],
    },
)
