"""What `pip install` brings: the command, the data inside of the package, what each extra adds."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from galaxy_mae import __main__
from galaxy_mae.__main__ import COMMANDS, DEMO
from galaxy_mae.catalogue.__main__ import main as catalogue
from galaxy_mae.errors import UserError
from galaxy_mae.model.encoder import load_encoder
from galaxy_mae.model.saved_model import SavedModel
from galaxy_mae.provenance import commit
from galaxy_mae.training.recipe import EVALUATION, PRETRAINING, RECIPES, build_parser, find_recipe, pop_flag

ROOT = Path(__file__).resolve().parents[1]


def galaxy_mae(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the command, as the script of an installation does."""
    program = "import sys; sys.argv[0] = 'galaxy-mae'; from galaxy_mae.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("name", "usage"),
    [("pretrain", "galaxy-mae pretrain [--config RECIPE]"), ("page", "python -m galaxy_mae.catalogue page")],
)
def test_a_command_shows_its_help(name, usage):
    """A script's and a module's."""
    done = galaxy_mae(name, "--help", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {usage}")
    assert all(importlib.util.find_spec(module) for module, _, _ in COMMANDS.values())


def test_help_and_mistakes(tmp_path):
    """The list of commands; an error of a command names it, and is a line with status 2."""
    listed = galaxy_mae(cwd=ROOT).stdout
    assert all(re.search(rf"^  {name} ", listed, re.MULTILINE) for name in (*COMMANDS, "demo", "env"))
    done = galaxy_mae("pertrain", cwd=ROOT)
    line = "galaxy-mae: error: there is no command pertrain; galaxy-mae --help lists them\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    done = galaxy_mae("pretrain", "--config", "nothing", cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("galaxy-mae pretrain: error: --config nothing: cannot be read")


def test_the_demo_names_commands_and_recipes():
    for command in DEMO:
        assert command.split()[0] in COMMANDS
        for name in re.findall(r"--config (\S+)", command):
            assert find_recipe(name).parent == RECIPES


def test_every_command_of_the_readme_exists(capsys):
    """Targets of make, scripts, commands, flags and recipes; and no page that it links to is missing."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    commands = [re.sub(r"\s+#.*", "", line).split() for line in lines]
    parsers = {"main.py": PRETRAINING, "linear_probe_checkpoints.py": EVALUATION}
    targets = re.findall(r"^([\w-]+)(?= |:)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, first, *rest in [command for command in commands if command[0] in ("make", "python")]:
        if program == "make":
            assert first in targets
        elif first == "-m":
            with pytest.raises(SystemExit):
                catalogue([rest[1], "--help"])
            known = re.findall(r"-+[\w-]+", capsys.readouterr().out)
            assert {word for word in rest if word.startswith("-")} <= set(known)
        else:
            config, flags = pop_flag("--config", rest)
            assert build_parser(parsers[first]).parse_known_args(flags)[1] == []
            assert config is None or find_recipe(config).is_file()
    for name in re.findall(r"(?<= )(?:run_|slurm/)[\w.]+", "".join(lines)):
        assert (ROOT / name).is_file()
    for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize(("minutes", "epochs"), [("0.1", 1), ("2", 10), ("60", 15)])
def test_compare_chooses_the_epochs_that_fit(minutes, epochs, tmp_path, monkeypatch):
    """By a throughput that is measured once: at least one, at most the recipe's. A second call resumes."""
    commands = []

    def run(command):
        """Of 1,600 images, 160 images/s: 10 s an epoch, and 0.9 s for each of 22 evaluations: 10 are two minutes."""
        commands.append(command)
        if "--max_steps" in command:
            history = [{"eval_runtime": 0.9}, {"images_per_second": 160.0, "epoch": 0.4}, {"epoch": 0.48}]
            folder = Path(command[-1])
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
            (folder / "run.json").write_text(json.dumps({"recipe": {"batch_size": 64, "num_train_epochs": 15.0}}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(__main__, "_run", run)
    for _ in range(2):
        __main__.compare(["my/galaxies.parquet", "--minutes", minutes])
    assert [command[0] for command in commands] == ["pretrain", "pretrain", "evaluate", "pretrain", "evaluate"]
    assert commands[1] == commands[3]
    pretrain, evaluate = (" ".join(command) for command in commands[1:3])
    assert f"--num_train_epochs {epochs} --output_dir runs/compare_my_galaxies_parquet" in pretrain
    assert "--encoder runs/compare_my_galaxies_parquet" in evaluate
    with pytest.raises(UserError, match="another --minutes or --config"):
        __main__.compare(["my/galaxies.parquet", "--minutes", "7"])


def test_what_a_report_of_a_problem_needs(tmp_path):
    done = galaxy_mae("env", cwd=ROOT)
    about = json.loads(done.stdout)
    assert {"torch", "transformers", "galaxy-mae", "wandb"} <= set(about["versions"])
    assert about["device"]
    assert str(Path.home()) not in done.stdout


def test_recipes_are_found_by_name_and_path(tmp_path, monkeypatch):
    """Anywhere; a file of one's own comes first."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == find_recipe("recipes/demo.yaml") == RECIPES / "demo.yaml"
    assert find_recipe("sweep/mask_ratio").read_bytes() == (ROOT / "recipes/sweep/mask_ratio.yaml").read_bytes()
    (tmp_path / "demo").write_text("image_size: 32\n")
    assert find_recipe("demo") == Path("demo")


@pytest.mark.parametrize("name", ["pretrained", "pretrained/galaxy-zoo-small"])
def test_the_small_model_is_found_anywhere(tmp_path, monkeypatch, name):
    expected = load_encoder(str(ROOT / "pretrained/galaxy-zoo-small")).model.state_dict()
    for folder in (tmp_path, ROOT):
        monkeypatch.chdir(folder)
        found = load_encoder(name).model.state_dict()
        assert all(found[key].equal(expected[key]) for key in expected)


def test_a_folder_of_ones_own_hides_the_small_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained" / "galaxy").mkdir(parents=True)
    for name in ("pretrained", "pretrained/galaxy"):
        with pytest.raises(UserError, match=f"--model {name}: no model there"):
            SavedModel.find(name, "--model")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build leaves files in its folder."""
    pytest.importorskip("setuptools", "77", "setuptools is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (folder / "copy").mkdir()
    copy = ["cp", "-P", "--parents", *filter(None, tracked.split("\0")), folder / "copy"]
    subprocess.run(copy, cwd=ROOT, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "--wheel-dir", folder, folder / "copy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_a_wheel_works_without_the_repository(wheel, tmp_path):
    """Unpacked over this environment's packages, inside of a repository that is not this one."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *me, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "galaxy_mae" / "py.typed").is_file()
    program = (
        "import galaxy_mae, json, pathlib\n"
        f"assert pathlib.Path(galaxy_mae.__file__).is_relative_to({str(site)!r})\n"
        "from galaxy_mae.provenance import commit\n"
        "from galaxy_mae.training.recipe import read_recipe\n"
        "print(commit(), read_recipe(['--config', 'demo', '--report_to', 'none']).model.hidden_size)\n"
        "print(len(galaxy_mae.predict('synthetic:3')))\n"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "GALAXY_MAE_CACHE": str(tmp_path / "cache")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment)
    assert done.stdout.split() == ["None", "96", "3"], done.stderr[-2000:]


def test_the_commit_is_known_in_the_repository():
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit() or "")


def test_the_extras_are_what_requirements_name():
    """requirements.txt is the core with wandb and galaxy10; the files of survey are the extra's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def lines(name: str) -> set[str]:
        return {line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#"}

    assert lines("requirements.txt") == {"-r requirements-core.txt", *extras["wandb"], *extras["galaxy10"]}
    assert lines("requirements-survey.txt") == set(extras["survey"])


def test_versions_agree():
    """Of the package, its citation and the newest entry of its changes."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


@pytest.mark.slow
def test_the_site_of_the_pages(tmp_path):
    """Every link and anchor leads somewhere; the pages load nothing from elsewhere."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r"<(link|script|img)[^>]*(href|src)=\"?(https?:)?//", page.read_text())


def test_the_images_for_containers_install_as_the_readme_does():
    """On an image with a C compiler, which torch.compile needs on a GPU; Apptainer's has each file of the wheel."""
    install = "pip install {}-r requirements.txt -c constraints.txt"
    assert install.format("") in (ROOT / "README.md").read_text()
    for name in ("Dockerfile", "apptainer.def"):
        text = (ROOT / name).read_text()
        assert install.format("--no-cache-dir ") in text
        assert re.search(r"^from:? python:3.11$", text, re.MULTILINE | re.IGNORECASE)
    copied = set(re.findall(r"^    (\S+) /opt/galaxy-mae/$", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {project["readme"], *project["license-files"], "pyproject.toml", "requirements-core.txt", "galaxy_mae"}
    needed |= {path.resolve().name for path in (ROOT / "galaxy_mae").iterdir() if path.is_symlink()}
    assert needed | {"requirements.txt", "constraints.txt"} == copied


def test_workflows_and_templates_are_what_github_reads():
    """YAML, and what they run is there."""
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for line in targets for name in line.split()}
    for path in (ROOT / ".github").rglob("*.yml"):
        content = yaml.safe_load(path.read_text())
        for job in content.get("jobs", {}).values():
            for step in job["steps"]:
                command = step.get("run", "make lint").split()
                assert command[1] in (".ci/run", "${{", *targets)
        if "body" in content:
            assert {"name", "description", "body"} <= set(content)
