"""Build the compiled data plane: every .pyx of the package becomes one extension module."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# NBDZRAM_SANITIZE=address,undefined builds for the sanitizer run of the test suite.
SANITIZE = os.environ.get("NBDZRAM_SANITIZE", "")
FLAGS = ["-O3", "-g1", "-fno-strict-aliasing", "-pthread"]
FLAGS += ["-Wno-unused-function", "-Wno-unused-const-variable", "-Wno-sign-compare"]
if SANITIZE:
    FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing", f"-fsanitize={SANITIZE}"]
# NBDZRAM_DEBUG=1 turns on every assertion of the compiled code (engine/must.pxd), and not only the cheap ones.
if os.environ.get("NBDZRAM_DEBUG"):
    FLAGS.append("-DNBDZRAM_DEBUG")
LINK = ["-pthread", *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])]

extensions = [
    Extension(
        ".".join(source.with_suffix("").parts),
        [str(source)],
        extra_compile_args=FLAGS,
        extra_link_args=LINK,
        libraries=["dl"],
    )
    for source in sorted(Path("nbdzram").rglob("*.pyx"))
]

if __name__ == "__main__":  # cythonize's helper processes read this file too, from Python 3.14 on
    setup(
        ext_modules=cythonize(
            extensions,
            nthreads=os.cpu_count() or 1,
            compiler_directives={
                "language_level": 3,
                "boundscheck": False,
                "wraparound": False,
                "cdivision": True,
                "initializedcheck": False,
                "embedsignature": True,
            },
        ),
        options={"build_ext": {"parallel": os.cpu_count() or 1}},
    )
