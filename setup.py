"""Packaging: two libraries in one distribution, ``whp_fast`` (the trainer) and ``whp_kernels`` (losses)."""

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch>=2.11",
    "numpy>=1.26",
    "numba>=0.60",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",
    "ahocorasick_rs>=0.22",
    "jsonargparse[signatures]>=4.37",
    "pyyaml>=6",
    "rich>=13",
    "matplotlib>=3.8",
]
TEST_REQUIREMENTS = [
    "transformers>=4.57",
    "protobuf>=4",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.9",
]

setup(
    name="whp_fast",
    version="0.1.0",
    description="Make a language model forget a corpus: 'Who's Harry Potter?' unlearning, fast and exact",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["whp_fast", "whp_fast.*"]), *find_packages("kernels")],
    package_dir={"whp_kernels": "kernels/whp_kernels"},
    package_data={"whp_fast": ["configs/*.yaml"]},
    install_requires=REQUIREMENTS,
    extras_require={"test": TEST_REQUIREMENTS},
)
