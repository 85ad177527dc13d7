import re
from pathlib import Path

import pytest
import torch

import twofold.errors
from twofold.errors import CODES, BackendUnavailableError, OptionError, TwofoldError
from twofold.options import Options

SOURCES = Path(twofold.errors.__file__).parent


@pytest.fixture(autouse=True)
def _no_engine_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOFOLD_ENGINE", raising=False)


def test_defaults():
    assert Options.make() == Options("auto", "auto", "fused", 2, True, False)


def test_given_values_are_kept():
    made = Options.make(engine="coexecution", backend="replay", numerics="exact", warm_up=1, background=False)
    assert made == Options("coexecution", "replay", "exact", 1, False)


def test_unknown_option_names_the_nearest_and_lists_all():
    with pytest.raises(OptionError, match=r"'bakend' \(did you mean 'backend'\?\)") as caught:
        Options.make(bakend="auto")
    assert all(
        name in str(caught.value) for name in ("engine", "backend", "numerics", "warm_up", "background", "strict")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"backend": "inductr"},
            "auto, replay, cuda_graph, inductor, got 'inductr' (did you mean 'inductor'?)",
        ),
        ({"engine": None}, "got None"),
        ({"engine": []}, "got []"),
        ({"numerics": "EXACT"}, "fused, exact, got 'EXACT'"),
        ({"warm_up": 0}, "at least 1, got 0"),
        ({"warm_up": True}, "at least 1, got True"),
        ({"warm_up": 2.0}, "at least 1, got 2.0"),
        ({"background": 1}, "True or False, got 1"),
        ({"strict": "yes"}, "True or False, got 'yes'"),
    ],
)
def test_bad_value_is_refused_in_one_line(given: dict[str, object], message: str):
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        Options.make(**given)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_cuda_graph_without_a_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"needs a CUDA device .* use backend='auto'"):
        Options.make(backend="cuda_graph")


def test_inductor_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(BackendUnavailableError, match=r"needs a C\+\+ compiler"):
        Options.make(backend="inductor")
    Options.make(backend="auto")


def test_environment_switches_twofold_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOFOLD_ENGINE", "eager")
    assert Options.make(engine="coexecution").engine == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Options.make(backend="cuda_graph")  # nothing will run on it


def test_bad_engine_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOFOLD_ENGINE", "egaer")
    with pytest.raises(OptionError, match=r"TWOFOLD_ENGINE.*did you mean 'eager'"):
        Options.make()


def test_every_code_used_in_the_package_is_documented():
    used = {
        code
        for file in SOURCES.rglob("*.py")
        for code in re.findall(r"\.(?:fallback|refusal)\(\s*\"(\w+)\"", file.read_text())
    }
    assert used <= CODES.keys()


def test_every_code_is_used_in_the_package():
    source = "".join(file.read_text() for file in SOURCES.rglob("*.py") if file.name != "errors.py")
    assert [code for code in CODES if f'"{code}"' not in source] == []


def test_limits_page_says_of_each_code_what_the_report_says():
    page = (SOURCES.parents[1] / "docs" / "limits.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert {code: (meaning, hint) for code, meaning, hint in rows} == CODES


def test_each_error_is_a_twofold_error():
    raised = [
        value for value in vars(twofold.errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert all(issubclass(error, TwofoldError) for error in raised)
