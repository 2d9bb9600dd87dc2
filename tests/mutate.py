"""Plants one fault at a time in the kernels' sources, which the tests must catch: `python tests/mutate.py --seed 1`.

Faults are derived from the sources by class and drawn at random, from each class in turn. A fault that does not compile
is replaced by another. A fault that survives shows a gap in the tests or changes no result; in the latter case its
entry in docs/mutation.json says why (`--why NUMBER TEXT`), and docs/mutation.md shows it.

C++ is tested by the operators' tests of the native lane, CUDA under the host emulation, and Triton in its interpreter,
with barriers checked in the compiled code. A file of one operator is tested by the tests of that operator. All runs use
copies of the tree.
"""

import argparse
import ast
import functools
import io
import json
import os
import queue
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from run import LANES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/mutation.json"
PAGE = ROOT / "docs/mutation.md"

# --- what can be planted ---------------------------------------------------------------------------------------------

#: A name, with what is called and indexed of it.
OPERAND = r"[A-Za-z_][\w.]*(?:::\w[\w.]*)*(?:<\w+>)?(?:\((?:[^()]|\([^()]*\))*\))?(?:\[[^\[\]]*\])*"
#: What a step in memory is made of.
SIZE = (
    r"(?:[\w.]*(?:stride|width|height|positions|channels|chunks|tiles|rows|threads)(?:\(\))?"
    r"|k[A-Z]\w+|[CPHWRK]|HW|(?:BLOCK|VEC)_\w|GROUP|FOLD)(?![\w.(\[])"
)
#: Names that come in pairs, one for each axis or channels and positions.
PAIRS = [
    ("height", "width"), ("row", "column"), ("rows", "columns"), ("channels", "positions"), ("images", "channels"),
    ("H", "W"), ("C", "P"), ("BLOCK_C", "BLOCK_P"), ("mu1", "mu2"), ("sigma1", "sigma2"), ("by_mu1", "by_mu2"),
    ("by_sigma1", "by_sigma2"), ("cosine", "sine"), ("u", "v"), ("c", "p"), (":, None", "None, :"),
    ("size(2)", "size(3)"), ("size(0)", "size(1)"), ("lo", "hi"), ("local", "query"), ("values", "anchors"),
    ("grad_output", "x"), ("first", "last"), ("begin", "end"),
]  # fmt: skip


def other_number(match):
    text = match.group()
    return str(int(text) + 1) if text.isdigit() else str(1.5 * float(text) or 1.0)


def swaps():
    for a, b in PAIRS:
        for one, other in ((a, b), (b, a)):
            yield rf"(?<![\w.]){re.escape(one)}(?![\w(])" if one[-1] not in ")e:" else re.escape(one), other


#: class -> (pattern, replacement), of code without comments and strings.
FAULTS = {
    "sign": [(r"(?<= )\+(?= )", "-"), (r"(?<= )-(?= )", "+"), (r"\+=", "-="), (r"-=", "+="),
             (r"(?:(?<=[=,?:*] )|(?<=\()|(?<=return ))-(?=[\w(])", "")],
    "comparison": [(r"(?<= )<(?= )", "<="), (r"(?<= )<=(?= )", "<"), (r"(?<= )>(?= )", ">="), (r"(?<= )>=(?= )", ">"),
                   (r"==", "!="), (r"!=", "=="), (r"&&", "||"), (r"\|\|", "&&"), (r"(?<=\)) & (?=\()", " | ")],
    "bound": [(rf"(?<= < )((?>{OPERAND})|\d+)", r"\1 - 1"), (r"\bmin(?=[(<])", "max"), (r"\bmax(?=[(<])", "min"),
              (r"\bminimum(?=\()", "maximum"), (r"\bmaximum(?=\()", "minimum"), (r"\brange\(0,", "range(1,"),
              (r"(?<=for \(int64_t )(\w+) = 0", r"\1 = 1"), (r"(?<=for \(int )(\w+) = 0", r"\1 = 1"),
              (r"\bceil_div\(", "divide("), (r"\b(?:tl|triton)\.cdiv\(([^(),]+), ([^(),]+)\)", r"(\1 // \2)")],
    "stride": [(rf" \* {SIZE}", "")],
    "constant": [(r"(?<![\w.])\d+(?![\w.])", other_number), (r"(?<![\w.])\d+\.\d+(?![\w.])", other_number)],
    "dropped term": [(rf" [+-] (?>{OPERAND})(?! \*)", ""), (rf" \* (?!{SIZE})(?>{OPERAND})", ""),
                     (r"(?<=[\w\])]) [+]=", " =")],
    "dropped barrier": [(r"__syncthreads\(\);", ";"), (r"__syncthreads_or\((\w+)\)", r"(\1)"),
                        (r"_mm_sfence\(\);", ";"), (r"tl\.debug_barrier\(\)", "pass")],
    "swapped axis": list(swaps()),
    "skipped cast": [(r"static_cast<\w+>\(", "("), (r"\b(?:A|T|S|float|double|Wide<T>)\((?=\w)", "("),
                     (r"\.to\([^()]*(?:\([^()]*\))?[^()]*\)", ""), (r"\bdouble(?= \w+(?:\[\w*\])? = )", "float")],
}  # fmt: skip


def code_of(path: Path) -> str:
    """The source with blanks in place of comments, strings, declarations, and code that the host emulation skips."""
    text = path.read_text(encoding="utf-8")

    def blank(match):
        return re.sub(r"[^\n]", " ", match.group())

    if path.suffix != ".py":
        for pattern in (
            r"//[^\n]*", r"/\*.*?\*/", r"^#if !?defined\(ATTNKERN_ON_HOST\)\n.*?^#endif", r'"(?:\\.|[^"\\\n])*"',
            r"^[ \t]*#(?:\\\n|[^\n])*", r"\btemplate <[^\n]*?>(?= )",
            r"^[^\n]*\b(?:static_assert|STD_TORCH_CHECK|using|namespace|m\.impl|typename)\b[^\n]*$",
        ):  # fmt: skip
            text = re.sub(pattern, blank, text, flags=re.MULTILINE | re.DOTALL)
        return text
    lines = [list(line) for line in text.splitlines(keepends=True)]

    def erase(begin, end):
        for row in range(begin[0] - 1, end[0]):
            first, last = begin[1] if row == begin[0] - 1 else 0, end[1] if row == end[0] - 1 else len(lines[row])
            lines[row][first:last] = [c if c == "\n" else " " for c in lines[row][first:last]]

    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            erase(token.start, token.end)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            erase((first, 0), (node.body[0].lineno, 0))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            erase((node.lineno, 0), (node.end_lineno, node.end_col_offset))
    return "".join("".join(line) for line in lines)


def undefined(new: str, code: str, position: int) -> bool:
    """Whether a name is not defined in the Python function around a position, which Python reports only at run time."""
    begin = max((match.start() for match in re.finditer(r"^(?=\S)|\n\n\n", code[:position], re.M)), default=0)
    end = re.compile(r"\n\n\n").search(code, position)
    return new.isidentifier() and not re.search(rf"\b{new}\b", code[begin : end.start() if end else len(code)])


@functools.cache
def faults_in(path: Path) -> dict[str, list[dict]]:
    """All faults that can be planted in a file, by class."""
    text, code = path.read_text(encoding="utf-8"), code_of(path)
    found = {}
    for kind, rules in FAULTS.items():
        for pattern, replacement in rules:
            for match in re.finditer(pattern, code):
                new = replacement(match) if callable(replacement) else match.expand(replacement)
                if path.suffix == ".py" and kind == "swapped axis" and undefined(new, code, match.start()):
                    continue
                if match.group() != text[match.start() : match.end()]:  # there is a string inside
                    continue
                begin, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
                fault = {
                    "file": str(path.relative_to(ROOT)),
                    "line": text.count("\n", 0, match.start()) + 1,
                    "class": kind,
                    "before": text[begin:end].strip(),
                    "after": (text[begin : match.start()] + new + text[match.end() : end]).strip(),
                    "at": [match.start(), match.end(), new],
                }
                found.setdefault(kind, []).append(fault)
    return found


def drawn(path: Path, seed: int):
    """The faults of a file in random order, from each class in turn."""
    found = {kind: [*faults] for kind, faults in faults_in(path).items()}
    generator = random.Random(f"{seed} {path.relative_to(ROOT)}")
    for faults in found.values():
        generator.shuffle(faults)
    kinds = sorted(found)
    generator.shuffle(kinds)
    while any(found.values()):
        for kind in kinds:
            if found[kind]:
                yield dict(found[kind].pop())


# --- how it is judged ------------------------------------------------------------------------------------------------

FOLDERS = {"csrc/cuda": "cuda", "attnkern/_triton": "triton"}  # the other files of csrc are C++
#: file of an operator: pytest's -k expression for the tests of the operator
OPERATORS = {"window": "window", "quantize": "quantize or anchor", "pool": "pool"}
EVERY = ["kernels/test_ops.py", "kernels/test_promises.py"]
SUITES = {  # tests in order, environment
    "native": (
        ["native/test_scalar_math.py", *EVERY, "native/test_fuzz.py", "kernels/test_extreme_inputs.py",
         "kernels/test_memory_layout.py", "kernels/test_changed_tensors.py", "kernels/test_threads.py",
         "kernels/test_failures.py"],
        LANES["native"][1] | {"ATTNKERN_TEST_BACKENDS": "native"},
    ),
    "cuda": (["cuda_kernels/test_cuda_on_host.py", *EVERY], LANES["cuda"][1]),
    "triton": (EVERY, LANES["interpreted"][1]),
}  # fmt: skip


#: Faults per file.
EACH = 8


def kernel_files() -> list[Path]:
    return sorted(
        path
        for path in [*ROOT.glob("csrc/**/*"), *ROOT.glob("attnkern/_triton/*.py")]
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py") and "isa" not in path.stem and faults_in(path)
    )


REFUSED = "refused"  # by Triton's compiler, which runs with the tests


#: Like setup.py, but faster: with -O1, and for one instruction set unless the file depends on it.
BUILD = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from cuda_on_host import HASH, ROOT, TORCH, make
flags = ["-std=c++20", "-O1", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
         f'-DATTNKERN_SCHEMA_HASH="{HASH}"', "-Icsrc", f"-isystem{TORCH}/include", *filter(None, sys.argv[1:])]
folder = Path("baseline" if sys.argv[1] else "all")
folder.mkdir(exist_ok=True)
lines = [line.split() for line in open("csrc/sources.txt")]
sources = [ROOT / line[1] for line in lines if line[:1] == ["cpu"]]
objects = [make(folder / f"{s.stem}.o", [s, *ROOT.glob("csrc/**/*.h")], *flags, "-c", s) for s in sources]
Path("attnkern/_C.so").unlink(missing_ok=True)
make(ROOT / "attnkern/_C.so", objects, "-shared", *objects, f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10")
"""


class Copy:
    """A copy of the tree to plant faults in."""

    def __init__(self, folder: Path):
        self.root = folder
        for name in ("attnkern", "csrc", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C_cuda*", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.environment = os.environ | {
            "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }  # fmt: skip
        for old in folder.glob("attnkern/_C*.so"):
            old.unlink()

    def python(self, *arguments, **options):
        return subprocess.run([sys.executable, *arguments], cwd=self.root, capture_output=True, text=True, **options)

    def build(self, kind: str, file: str) -> bool:
        """Build the libraries that the tests of a kind load."""
        baseline = (
            "" if "ATTNKERN_X86" in (self.root / file).read_text(encoding="utf-8") else "-DATTNKERN_BASELINE_ONLY"
        )
        done = self.python("-c", BUILD, baseline, env=self.environment)
        if done.returncode == 0 and kind == "cuda":
            load = "import sys; sys.path.insert(0, 'tests'); import cuda_on_host; cuda_on_host.load()"
            done = self.python("-c", load, env=self.environment)
        return done.returncode == 0

    def caught(self, kind: str, operator: str | None) -> str | None:
        """What caught the fault: a test, a crash, or the time limit of a test; None if all tests pass."""
        files, environment = SUITES[kind]
        kernels = self.root / "tests/kernels"
        own = [path for name in ([operator] if operator else OPERATORS) for path in kernels.glob(f"test_{name}*.py")]
        own = [f"kernels/{path.name}" for path in sorted(own)]
        by = self.tested(own + files, OPERATORS[operator] if operator else "", environment)
        if by is None and kind == "triton":  # the interpreter does not show missing barriers
            by = self.tested(LANES["ahead"][0], "companions or more_channels", LANES["ahead"][1])
        return by

    def tested(self, files: list[str], keyword: str, environment: dict[str, str]) -> str | None:
        command = ["-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-k", keyword]
        command += ["-o", "faulthandler_timeout=120", "-o", "faulthandler_exit_on_timeout=true"]
        done = self.python(
            *command, *(f"tests/{name}" for name in files), env=self.environment | environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (10 << 30, 10 << 30)),
        )  # fmt: skip
        if done.returncode == 0:
            return None
        if re.search(r"NameError|UnboundLocalError|CompilationError|SyntaxError|power of 2", done.stdout):
            return REFUSED
        if failed := re.search(r"^(?:FAILED|ERROR) tests/\w+/(\S+)", done.stdout, re.MULTILINE):
            return failed.group(1)
        running = re.findall(r'File "[^"]*/tests/\w+/(test_\w+\.py)", line \d+ in (test_\w+)', done.stderr)
        where = f" in {'::'.join(running[0])}" if running else ""
        if "Timeout" in done.stderr:
            return "a time limit" + where
        if done.returncode < 0:
            return f"signal {-done.returncode}" + where
        return f"exit status {done.returncode}: " + (done.stdout + done.stderr).strip()[-200:]


def judged_by(path: Path) -> tuple[str, str | None]:
    """The kind of tests for a file, and its operator; None for all operators."""
    kind = FOLDERS.get(str(path.relative_to(ROOT).parent), "native")
    operator = path.stem.split("_")[0]
    return kind, operator if operator in OPERATORS else None


def judge(copy: Copy, fault: dict) -> bool:
    """Plant a fault and record what caught it; False if it does not compile."""
    path = copy.root / fault["file"]
    original = path.read_text(encoding="utf-8")
    begin, end, new = fault.pop("at")
    kind, operator = judged_by(ROOT / fault["file"])
    began = time.monotonic()
    path.write_text(original[:begin] + new + original[end:], encoding="utf-8")
    try:
        if not copy.build(kind, fault["file"]):
            return False
        fault["caught"] = copy.caught(kind, operator)
        fault["seconds"] = round(time.monotonic() - began)
        return fault["caught"] != REFUSED
    finally:
        path.write_text(original, encoding="utf-8")


# --- the page --------------------------------------------------------------------------------------------------------


def page(results: dict) -> str:
    mutants = results["mutants"]
    caught = [m for m in mutants if m["caught"]]
    survivors = [m for m in mutants if not m["caught"]]
    lines = [
        "# Planted faults",
        "",
        "One fault at a time is planted in the sources of the kernels, drawn at random from each class in turn; the",
        f"tests must catch it. `make mutate SEED={results['seed']}` continues this run; without a seed it draws other",
        "faults; `tests/mutate.py --again` tests the same faults again. The whole list is in `docs/mutation.json`.",
        "",
        f"Seed {results['seed']}: {len(mutants)} faults, {len(caught)} caught, {len(survivors)} survived"
        + (", each of which changes no result:" if all(m.get("why") for m in survivors) else "."),
        "",
        "| file | planted | caught |",
        "|---|---|---|",
    ]
    for file in dict.fromkeys(m["file"] for m in mutants):
        of = [m for m in mutants if m["file"] == file]
        lines.append(f"| `{file}` | {len(of)} | {sum(m['caught'] is not None for m in of)} |")
    judged = Counter(m["file"] for m in mutants)
    names = [str(path.relative_to(ROOT)) for path in kernel_files()]
    if waiting := [f"`{name}` ({judged[name]})" for name in names if judged[name] < EACH]:
        lines += [
            "",
            f"Files with fewer than {EACH} faults, new or rewritten since the last run: {', '.join(waiting)}.",
        ]
    lines += ["", "| class | planted | caught |", "|---|---|---|"]
    for kind in FAULTS:
        of = [m for m in mutants if m["class"] == kind]
        lines.append(f"| {kind} | {len(of)} | {sum(m['caught'] is not None for m in of)} |")
    lines += ["", "## Survivors", ""]
    for m in survivors:
        lines += [f"- `{m['file']}`, {m['class']}: {m.get('why') or 'unexplained'}", "", "    ```diff"]
        lines += [f"    - {m['before']}", f"    + {m['after']}", "    ```", ""]
    return "\n".join(lines).rstrip() + "\n"


def save(results: dict) -> None:
    results["mutants"].sort(key=lambda m: (m["file"], m["line"], m["after"]))
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


def key(mutant):
    return mutant["file"], mutant["before"], mutant["after"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="random seed; default: a new one")
    parser.add_argument("--each", type=int, default=EACH, help="faults per file")
    parser.add_argument("--files", default="", help="only files whose path matches this regular expression")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="test faults of earlier runs again")
    parser.add_argument("--survivors", action="store_true", help="test only survivors without an explanation again")
    parser.add_argument("--why", nargs=2, metavar=("NUMBER", "TEXT"), help="explain a survivor, counted from 0")
    parser.add_argument(
        "--page", action="store_true", help="write docs/mutation.md again, after changes of the sources"
    )
    arguments = parser.parse_args()

    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"seed": None, "mutants": []}
    if arguments.page:
        save(kept)
        return 0
    if arguments.why:
        survivors = [m for m in kept["mutants"] if not m["caught"]]
        survivors[int(arguments.why[0])]["why"] = arguments.why[1]
        save(kept)
        return 0
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    known = {key(m): m for m in kept["mutants"]}
    results = kept if kept["seed"] == seed else {"seed": seed, "mutants": []}
    lock, copies = threading.Lock(), queue.SimpleQueue()
    files = [path for path in kernel_files() if re.search(arguments.files, str(path.relative_to(ROOT)))]

    sound = set()  # kinds whose tests pass without a planted fault

    def check(copy, path):
        kind, operator = judged_by(path)
        if (kind, operator) not in sound:
            sound.add((kind, operator))
            why = "it does not build" if not copy.build(kind, path.relative_to(ROOT)) else copy.caught(kind, operator)
            print(f"nothing planted, {kind} {operator or 'all'}: {why or 'passes'}", flush=True)
            if why:
                os._exit(2)

    drafts = {path: drawn(path, seed) for path in files}

    def one(path):
        """Test the next fault of a file that compiles."""
        while True:
            with lock:
                fault = next(drafts[path], None)
            if fault is None:
                return
            old = known.get(key(fault))
            if arguments.survivors and (old is None or old["caught"] or old.get("why")):
                continue
            if not arguments.survivors and not arguments.again and old is not None and kept["seed"] == seed:
                return
            copy = copies.get()
            check(copy, path)
            valid = judge(copy, fault)
            copies.put(copy)
            if valid:
                break
        if old and old.get("why") and not fault["caught"]:
            fault["why"] = old["why"]
        with lock:
            results["mutants"] = [m for m in results["mutants"] if key(m) != key(fault)] + [fault]
            save(results)
            by = fault["caught"] or "SURVIVED" + (f": {fault['why']}" if "why" in fault else "")
            print(f"{fault['file']}:{fault['line']} {fault['class']}: {fault['after']}\n    {by}", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        for i in range(arguments.jobs):
            copies.put(Copy(Path(folder) / str(i)))
        list(pool.map(one, files * arguments.each))  # the first of each file, then the second
    unexplained = [m for m in results["mutants"] if not m["caught"] and not m.get("why")]
    caught = sum(m["caught"] is not None for m in results["mutants"])
    total = len(results["mutants"])
    print(f"seed {seed}: {total} faults, {caught} caught, {total - caught} survived, {len(unexplained)} unexplained")
    return len(unexplained) > 0


if __name__ == "__main__":
    sys.exit(main())
