"""What of a run is given to others, and how it is read again."""

import gzip
import html
import io
import json
import os
import pathlib
import re
import shutil
import tarfile

import pytest
from rich.console import Console

from experiments import bundle, compare, report, report_data, report_page
from experiments.machine_paths import MachinePaths
from experiments.packed_folder import pack, unpacked
from experiments.remote_run import readable
from tests.evaluations import FOLDER, evaluation
from tests.test_report import FAMILIES, make_run

ROOT = pathlib.Path(__file__).parent.parent


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def run(tmp_path):
    """A run with everything that is left out, and paths of this machine wherever they may be."""
    folder = make_run(tmp_path / "somebody" / "my run", iterations=3)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "actor": {"model": str(pathlib.Path.home() / "models" / "actor")},
        "reflector": {"model": "/opt/elsewhere/experiments/pocket/checkpoints/reflector"},
        "task": {
            "initial_prompt": "Walk /north/east at ~noon.",
            "environment": {
                "name": "minihack",
                "options": {"data": "/mnt/disk 1/games/a", "text": "full"},
            },
        },
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["argv"] = ["ictjax", "train", f"--run-dir={folder}", "--config", "/home/ann/c.json"]
    manifest["resumed"] = [{"argv": [f"data={ROOT}/games,x=/Users/bo/y", "~ann/z", "gs://b/r/a"]}]
    for name, data in (("config.json", config), ("manifest.json", manifest)):
        (folder / name).write_text(json.dumps(data))
    results = json.loads((folder / "evaluation.json").read_text())
    results["protocol"]["run_dirs"] = [str(folder), "runs/b"]
    for place in (folder, folder / FOLDER):
        (place / "evaluation.json").write_text(json.dumps(results))
    settings = {"step": 3, "task": {"environment": {"options": {"data": "/srv/games/a"}}}}
    (folder / FOLDER / "settings.json").write_text(json.dumps(settings))
    episodes = folder / FOLDER / "episodes" / "trained_eat.jsonl"
    first, *others = episodes.read_text().splitlines(keepends=True)
    failed = {**json.loads(first), "outcome": "failed", "error": f"in {folder}: /var/lib/nle/no"}
    episodes.write_text("".join([json.dumps(failed) + "\n", *others]))
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "checkpoints" / "3" / "state").mkdir(parents=True)
    (folder / "checkpoints" / "3" / "state" / "weights").write_bytes(b"w" * 100)
    for name in ("trainer.lock", "report.html", "episodes/iteration_00001.jsonl.12.tmp"):
        (folder / name).write_text("left out")
    return folder


def made(run, out, *flags):
    bundle.main([str(run), "--out", str(out), *flags])
    return out


def test_the_same_run_gives_the_same_bytes_and_so_does_its_bundle(run, tmp_path, capsys):
    packed = made(run, tmp_path / "a.tar.gz")
    said = capsys.readouterr().out
    for path in run.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert made(run, tmp_path / "b.tar.gz").read_bytes() == packed.read_bytes()
    folder = made(run, tmp_path / "out" / "my run")
    with unpacked(packed) as found:
        assert found.name == "my run"
        whole = contents(found)
        assert contents(folder) == whole
    again = made(folder, tmp_path / "c.tar.gz")
    assert again.read_bytes() == packed.read_bytes()
    assert made(packed, tmp_path / "d", "--force") and contents(tmp_path / "d") == whole
    assert f"Wrote {len(whole)} files to" in said and "without weights" in said
    # 3 of the 30 iterations that the run is to have
    assert "Not finished: The training is at iteration 3 of 30." in said
    about = json.loads(whole["bundle.json"])
    assert about["checkpoints"] == [2, 3]
    assert about["unfinished"] == ["The training is at iteration 3 of 30."]
    assert {f"{FOLDER}/settings.json", f"{FOLDER}/turns.jsonl", "metrics.jsonl"} <= whole.keys()
    assert not [name for name, data in whole.items() if b"left out" in data or "checkpoint" in name]


def test_no_path_of_a_machine_is_in_a_bundle(run, tmp_path):
    files = contents(made(run, tmp_path / "bundle"))
    text = b"\n".join(files.values()).decode()
    for path in (tmp_path, pathlib.Path.home(), ROOT, "/home", "/Users", "/mnt", "/opt", "/srv"):
        assert f"{path}/" not in text, path
    for name in ("ann", "bo/", "somebody", "/var/lib"):
        assert name not in text, name
    config = json.loads(files["config.json"])
    assert config["actor"]["model"] == "<home>/models/actor"
    assert config["reflector"]["model"] == "<checkout>/experiments/pocket/checkpoints/reflector"
    assert config["task"]["initial_prompt"] == "Walk /north/east at ~noon."  # no path
    manifest = json.loads(files["manifest.json"])
    assert manifest["argv"] == ["ictjax", "train", "--run-dir=<run>", "--config", "<home>/c.json"]
    assert manifest["resumed"][0]["argv"] == [
        "data=<checkout>/games,x=<home>/y",
        "<home>/z",
        "gs://b/r/a",
    ]
    results = json.loads(files["evaluation.json"])
    assert results["protocol"]["run_dirs"] == ["<run>", "runs/b"]
    errors = files[f"{FOLDER}/episodes/trained_eat.jsonl"].splitlines()
    assert json.loads(errors[0])["error"] == "in <run>: <path>/no"
    # what names no path is byte for byte what it was
    for name in ("metrics.jsonl", "prompts/iteration_00002.jsonl", f"{FOLDER}/turns.jsonl"):
        assert files[name] == (run / name).read_bytes()


def test_names_that_only_begin_like_a_folder_stay(tmp_path):
    paths = MachinePaths(tmp_path / "run")
    for text in (
        f"{tmp_path}/run-2",
        f"{tmp_path}/runs",
        f"{tmp_path}/run.old",
        f"x{tmp_path}/run",
    ):
        assert "<run>" not in paths.marked(text)
    assert paths.marked({f"{tmp_path}/run/a": [f"({tmp_path}/run)."]}) == {"<run>/a": ["(<run>)."]}


def test_reports_and_tables_of_a_bundle_are_those_of_the_run(run, tmp_path, capsys):
    packed = made(run, tmp_path / "my run.tar.gz")
    capsys.readouterr()
    report.main(["--run-dir", str(run)])
    of_run = capsys.readouterr().out
    report.main(["--run-dir", str(packed)])
    of_bundle = capsys.readouterr().out
    page = tmp_path / "my run-report.html"
    assert of_bundle.splitlines()[:-1] == of_run.splitlines()[:-1]
    assert of_bundle.splitlines()[-1] == f"Report: {page}"
    assert str(tmp_path) not in page.read_text()

    def rows(path):
        page = io.StringIO()
        with readable(path) as folder:
            Console(file=page, width=80).print(compare.compare((folder,)).table)
        return page.getvalue()

    assert rows(packed) == rows(run)


def joint(folder):
    """The results of several runs, as they are evaluated together: without config.json, metrics and
    what else belongs to one.
    """
    make_run(folder, iterations=1)
    for path in folder.iterdir():
        if not path.name.startswith("evaluation"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    results = evaluation(FAMILIES, runs=5, seeds=2)
    results["protocol"]["run_dirs"] = [str(folder.parent / "seed0"), str(folder.parent / "seed1")]
    results["environment"] = {"name": "minihack"}
    for place in (folder, folder / FOLDER):
        (place / "evaluation.json").write_text(json.dumps(results))
    (folder / FOLDER / "settings.json").write_text(json.dumps({"step": 3}))
    return folder


@pytest.mark.parametrize("name", ["evaluation", "evaluation-alfworld"])
def test_results_of_several_runs_are_bundled_and_read_again(tmp_path, capsys, name):
    folder = joint(tmp_path / "runs" / "seed0+seed1")
    if name != "evaluation":
        (folder / "evaluation.json").rename(folder / f"{name}.json")
    packed = made(folder, tmp_path / "others" / "both.tar.gz")
    said = capsys.readouterr().out
    assert "Not finished" not in said
    unpacked_to = made(packed, tmp_path / "again")
    files = contents(unpacked_to)
    about = json.loads(files["bundle.json"])
    assert about == {"format": 1, "run": folder.name, "checkpoints": [], "evaluations": [name],
                     "unfinished": []}  # fmt: skip
    assert f"{FOLDER}/turns.jsonl" in files
    assert not [path for path, data in files.items() if str(tmp_path).encode() in data]
    tables, reports = [], []
    for path in (folder, packed, unpacked_to):
        capsys.readouterr()
        compare.main([str(path)])
        shown = capsys.readouterr().out
        assert "of 2" in shown and "Left out" not in shown
        tables.append([word for word in shown.split() if re.fullmatch(r"[+-]?[\d.\[\],+-]+", word)])
        with readable(path) as run_dir:
            reports.append(report_page.render(report_data.load_run(run_dir)))
    assert str(tmp_path) not in reports[1]
    headline = json.loads(files[f"{name}.json"])["headline"]["text"]
    assert all(headline in html.unescape(page) for page in reports)
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) > 10


def test_nothing_is_replaced_unasked_and_only_bundles_are(run, tmp_path, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as stopped:
            bundle.main([str(word) for word in argv])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    bundle.main([str(run)])
    packed = run.with_name("my run.tar.gz")
    before = packed.read_bytes()
    assert "--force" in refused(run)
    packed.write_bytes(b"x")
    bundle.main([str(run), "--force"])
    assert packed.read_bytes() == before
    folder = made(run, tmp_path / "folder")
    assert "--force" in refused(run, "--out", folder)
    (folder / "more").write_text("")
    made(run, folder, "--force")
    assert not (folder / "more").exists()
    assert "leaves it alone" in refused(run, "--out", ROOT / "docs", "--force")
    assert "the run itself" in refused(run, "--out", run, "--force")
    assert "the run itself" in refused(folder, "--out", folder, "--force")
    assert "holds no run" in refused(tmp_path)
    assert not [path for path in tmp_path.rglob("*.tmp") if "episodes" not in str(path)]
    with (
        pytest.raises(ValueError, match="bundles hold no weights"),
        readable(packed, checkpoint="newest"),
    ):
        pass


def archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))


FILE = tarfile.REGTYPE


@pytest.mark.parametrize(
    "members",
    [
        [("run/../../escaped", FILE, b"x")],
        [("/escaped", FILE, b"x")],
        [("../escaped", FILE, b"x")],
        [("run/./a", FILE, b"x")],
        [("run/link", tarfile.SYMTYPE, b""), ("run/link/escaped", FILE, b"x")],
        [("run/link", tarfile.LNKTYPE, b"")],
        [("run/null", tarfile.CHRTYPE, b"")],
        [("run/fifo", tarfile.FIFOTYPE, b"")],
        [("run/a", FILE, b"1"), ("run/a", FILE, b"2")],
        [("run/a", FILE, b"1"), ("run/a/b", FILE, b"2")],
        [("run/a", FILE, b"1"), ("other/a", FILE, b"2")],
        [("a", FILE, b"in no folder")],
        [("run/" + "a" * 300, FILE, b"1")],
        [],
    ],
    ids=str,
)
def test_what_is_no_plain_file_below_one_folder_is_not_unpacked(tmp_path, members):
    archive(tmp_path / "b.tar.gz", members)
    with (
        pytest.raises(ValueError, match=r"b\.tar\.gz is no bundle"),
        unpacked(tmp_path / "b.tar.gz"),
    ):
        pass
    assert not list(tmp_path.parent.glob("escaped")) and not pathlib.Path("/escaped").exists()


def test_what_is_cut_off_or_too_large_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "b.tar.gz"
    noise, other = os.urandom(5000), os.urandom(5000)
    pack(path, "run", [("a", noise), ("b/c", other)])
    whole = path.read_bytes()
    with unpacked(path) as folder:
        assert contents(folder) == {"a": noise, "b/c": other}
    assert not folder.exists()
    for data in (
        b"",
        b"no gzip",
        whole[:6000],
        whole[:-8],
        whole + b"x",
        gzip.compress(b"no tar" * 500),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"b\.tar\.gz is no bundle"), unpacked(path):
            pass
    path.write_bytes(whole)
    monkeypatch.setattr("experiments.packed_folder._MOST_BYTES", 9_999)
    with pytest.raises(ValueError, match="more than any run"), unpacked(path):
        pass
