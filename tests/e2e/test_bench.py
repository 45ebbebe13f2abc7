"""`draftloom bench` as a user runs it, and its page in a browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--lengths", "5", "--repeats", "2", "--limit", "1", "--warm-up", "2")
SIMULATED = (
    "bench", "--simulate-acceptance", "0.9,0.6", "--shape", "tiny", "--dtype", "float32",
    "--prompt-tokens", "6", *QUICK,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def test_real_weights(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    toml, data, out = tmp_path / "mine.toml", tmp_path / "d.jsonl", tmp_path / "r.json"
    toml.write_text('drafter = "prompt-lookup"\nwidth = 2\n')
    data.write_text(json.dumps({"question": "One and one?", "answer": "2"}) + "\n")
    done = cli(
        "bench", "--target", tiny, "--pipeline", toml, "--drafter", "prompt-lookup",
        "--block-size", 4, "--width", "adaptive", "--suite", "math", "--dataset", data,
        "--json", out, *QUICK,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    report = json.loads(out.read_text())
    names = ["mlx-lm", "width 0", "mine", "prompt-lookup block 4", "prompt-lookup width adaptive"]
    assert [variant["name"] for variant in report["variants"]] == names
    assert len(report["runs"]) == len(names) * 2 * 2
    assert {run["suite"] for run in report["runs"]} == {"math", "gsm8k:d"}
    drafted = [run for run in report["runs"] if run["variant"] != "mlx-lm"]
    assert all(run["same_tokens"] for run in drafted)
    assert [entry["variant"] for entry in report["stages"]] == names[1:]
    assert report["simulated"] is None
    assert "simulated" not in done.out
    assert report["versions"].keys() == {"draftloom", "mlx", "mlx-lm"}
    for name in names:
        assert re.search(rf"^{re.escape(name)} +\d", done.out, re.MULTILINE)


def test_simulated(cli: Callable[..., Any], folder: Path) -> None:
    out = folder / "a.json"
    done = cli(*SIMULATED, "--json", out, "--html", folder / "a.html", "--width", 3)
    assert (done.code, done.err) == (0, "")
    lines = [line for line in done.out.splitlines() if line]
    assert len(lines) > 8
    assert all(line.startswith("simulated: ") for line in lines)
    report = json.loads(out.read_text())
    assert report["simulated"]["rates"] == [0.9, 0.6]
    assert all("simulated" in variant["name"] for variant in report["variants"])


def test_compare(cli: Callable[..., Any], folder: Path) -> None:
    first = folder / "a.json"
    if not first.exists():
        cli(*SIMULATED, "--json", first)
    changed = json.loads(first.read_text())
    changed["versions"]["mlx"] = "0.0.1"
    second = folder / "b.json"
    second.write_text(json.dumps(changed))
    same = cli("bench", "compare", first, first)
    assert (same.code, same.err) == (0, "")
    assert "1.000" in same.out
    other = cli("bench", "compare", first, second)
    assert other.code == 0
    assert "versions: mlx was" in other.err


BAD = {
    "suite": (("bench", "--suite", "coed"), "did you mean 'code'"),
    "data set": (("bench", "--dataset", "missing.jsonl"), "cannot be read"),
    "lengths": (("bench", "--lengths", "a,b"), "--lengths cannot be read"),
    "short": (("bench", "--lengths", "1"), "at least 2"),
    "repeats": (("bench", "--repeats", "0"), "--repeats must be at least 1"),
    "rest": (("bench", "--cool-down", "-1"), "--cool-down"),
    "width": (("bench", "--width", "wide"), "no width named 'wide'"),
    "block": (("bench", "--block-size", "0"), "block size"),
    "twice": (("bench", "--width", "2", "--width", "2"), "two variants"),
    "operation": (("bench", "--ablate-only", "sm"), "did you mean 'ssm'"),
    "ablate": (("bench", "--ablate", "--width", "2", "--width", "3"), "takes one pipeline"),
    "types": (("bench", "stability", "--types", "float32,"), "--types cannot be read"),
    "type": (("bench", "stability", "--types", "float31"), "did you mean 'float32'"),
    "window": (("bench", "stability", "--window", "4"), "--window must be at least 8"),
    "no draft": (("bench", "stability", "--drafter", "none"), "drafts nothing"),
    "pipeline": (("bench", "--pipeline", "missing.toml"), "cannot be read"),
    "json": (("bench", "--json", "no/such/folder.json"), "cannot be written"),
    "no shape": (("bench", "--simulate-acceptance", "0.5"), "needs a shape"),
    "shape": (
        ("bench", "--simulate-acceptance", "0.5", "--shape", "tyny"), "did you mean 'tiny'"
    ),
    "rate": (("bench", "--simulate-acceptance", "2", "--shape", "tiny"), "in [0, 1]"),
    "rates": (("bench", "--simulate-acceptance", "x", "--shape", "tiny"), "cannot be read"),
    "both": (
        ("bench", "--simulate-acceptance", "0.5", "--shape", "tiny", "--suite", "code"),
        "--suite does not go with",
    ),
    "shape alone": (("bench", "--shape", "tiny"), "--simulate-acceptance"),
    "compare": (("bench", "compare", "a.json", "b.json"), "cannot be read"),
    "generate": (("generate", "x", "--width", "-1"), "--width must be at least 0"),
    "generate both": (("generate", "x", "--width", "1", "--block-size", "2"), "one of them"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, cli: Callable[..., Any]
) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert message in done.err


def test_a_length_that_does_not_fit(cli: Callable[..., Any], tiny: Path) -> None:
    done = cli("bench", "--target", tiny, "--drafter", "prompt-lookup", "--lengths", 5000)
    assert (done.code, done.out) == (2, "")
    assert "the target's context holds 256" in done.err


def test_generate_takes_a_width(cli: Callable[..., Any], tiny: Path) -> None:
    common = ("generate", "def f", "--target", tiny, "--drafter", "prompt-lookup", "--json")
    for width, name in [("2", "fixed 2"), ("adaptive", "adaptive")]:
        done = cli(*common, "--max-tokens", 4, "--width", width)
        assert json.loads(done.out)["pipeline"]["width"] == name


PROBE = """<script>
addEventListener('load', () => {
  const drawn = [...document.querySelectorAll('svg.plot')].map((plot) => {
    const box = plot.getBoundingClientRect();
    const inside = [...plot.querySelectorAll('.mark')].filter((mark) => {
      const m = mark.getBoundingClientRect();
      return m.width > 0 && m.left >= box.left - 1 && m.right <= box.right + 1
        && m.top >= box.top - 1 && m.bottom <= box.bottom + 1;
    });
    return [plot.getAttribute('aria-label'), inside.length,
            plot.querySelectorAll('.mark').length];
  });
  document.title = 'PROBED' + JSON.stringify(drawn);
});
</script></body>"""


def drawn_in_a_browser(page: Path, folder: Path) -> list[list[Any]]:
    """(label, marks inside, marks) of every plot of a page, which must load without a word."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine")
    probed = folder / "probed.html"
    text = page.read_text(encoding="utf-8")
    text = text.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src *")
    text = text.replace("script-src *", "script-src 'unsafe-inline'").replace("</body>", PROBE)
    probed.write_text(text, encoding="utf-8")
    for file in (page, probed):
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
                f"--user-data-dir={folder / file.stem}", "--dump-dom", file.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r"<title>PROBED(.*?)</title>", done.stdout)
    assert found, "the page did not finish loading"
    drawn: list[list[Any]] = json.loads(found[1].replace("&quot;", '"'))
    assert all(inside == total > 0 for _, inside, total in drawn)
    return drawn


def test_page_in_a_browser(cli: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    only = ("--ablate-only", "gated-delta", "--ablate-only", "ssm")
    done = cli(*SIMULATED, *only, "--html", page)
    assert done.code == 0
    assert "not measured: ssm: qwen3_5 has no Mamba-2 layers" in done.err
    assert re.search(r"^simulated: gated-delta=chunked +[\d.]+", done.out, re.MULTILINE)
    drawn = drawn_in_a_browser(page, tmp_path)
    assert [label for label, *_ in drawn] == [
        "decoded tokens a second by length",
        "acceptance by draft position",
        "milliseconds a cycle by stage",
        "what each kernel is worth, 5 tokens",
    ]


def test_stability(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "s.json", tmp_path / "s.html"
    done = cli(
        "bench", "stability", "--target", tiny, "--drafter", "prompt-lookup", "--length", 30,
        "--window", 10, "--limit", 1, "--json", out, "--html", page,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^10-19 +\d\.\d\d", done.out, re.MULTILINE)
    report = json.loads(out.read_text())
    assert [entry["type"] for entry in report["stability"]] == ["float32", "bfloat16"]
    assert [len(entry["windows"]) for entry in report["stability"]] == [3, 3]
    labels = [label for label, *_ in drawn_in_a_browser(page, tmp_path)]
    assert labels == ["acceptance length over the text", "share that repeats"]
