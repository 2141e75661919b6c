"""Build the compiled data plane: every .pyx of the package becomes one extension module, a line each.

NBDZRAM_COMPILE says how: "yes" (the default); "no" leaves the modules out, for an editable installation whose modules
`build_ext --inplace` then makes, once; "done" takes those that lie in the tree already.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMPILE = os.environ.get("NBDZRAM_COMPILE", "yes")

# NBDZRAM_SANITIZE=address,undefined builds for the sanitizer run of the test suite.
SANITIZE = os.environ.get("NBDZRAM_SANITIZE", "")
FLAGS = ["-O3", "-g1", "-fno-strict-aliasing", "-pthread"]
FLAGS += ["-Wno-unused-function", "-Wno-unused-const-variable", "-Wno-sign-compare"]
if SANITIZE:
    FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing", f"-fsanitize={SANITIZE}"]
# NBDZRAM_COVERAGE=1 builds for `make coverage`: gcov counts the lines of the .pyx files themselves.
COVERAGE = bool(os.environ.get("NBDZRAM_COVERAGE"))
if COVERAGE:
    FLAGS = ["-O1", "-g", "--coverage", "-fprofile-update=atomic", "-fno-strict-aliasing", "-pthread", "-w"]
# NBDZRAM_DEBUG=1 turns on every assertion of the compiled code (engine/must.pxd), and not only the cheap ones.
if os.environ.get("NBDZRAM_DEBUG"):
    FLAGS.append("-DNBDZRAM_DEBUG")
LINK = ["-pthread", *(["--coverage"] if COVERAGE else [])]
# NBDZRAM_RUNTIME=1 leaves the sanitizer's own runtime out: another one is loaded in its place (tests/bench/sharing.py).
if SANITIZE and not os.environ.get("NBDZRAM_RUNTIME"):
    LINK.append(f"-fsanitize={SANITIZE}")

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


def forget_former(built: Path) -> None:
    """What an earlier build left whose source is gone: it would be packed, and imported in the place of a .py."""
    for file in built.glob("nbdzram/**/*.*"):
        source = file.relative_to(built)
        if file.suffix == ".so":
            source = source.with_name(f"{file.name.partition('.')[0]}.pyx")
        if not source.exists():
            file.unlink()


class BuildExtension(build_ext):
    """Says what it is at: a compiler that is silent for minutes looks like one that hangs."""

    def run(self) -> None:
        """All modules, and no former ones."""
        if not self.inplace:
            forget_former(Path(self.build_lib))
        super().run()

    def build_extension(self, extension: Extension) -> None:
        """One module. What is up to date makes no line."""
        made = Path(self.get_ext_fullpath(extension.name))
        ready = Path(self.get_ext_filename(extension.name))
        if COMPILE == "done" and not self.inplace and ready.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ready), str(made))
            return
        sources = [Path(source) for source in (*extension.sources, *extension.depends)]
        if not made.exists() or made.stat().st_mtime < max(source.stat().st_mtime for source in sources):
            sys.stdout.write(f"  compiling {extension.name}\n")  # one write: two compilers run side by side
            sys.stdout.flush()
        super().build_extension(extension)


if __name__ == "__main__":  # cythonize's helper processes read this file too, from Python 3.14 on
    setup(
        cmdclass={"build_ext": BuildExtension},
        ext_modules=cythonize(
            extensions if COMPILE != "no" else [],
            nthreads=os.cpu_count() or 1,
            emit_linenums=COVERAGE,
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
