"""The pages: what is generated is up to date, and what the site is built from has no dead link."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_benchmark_tables_are_those_of_the_results(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    subprocess.run([sys.executable, "scripts/benchmark_tables.py", str(page)], cwd=ROOT, check=True, timeout=60)
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text(), "run scripts/benchmark_tables.py"


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "docs", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
