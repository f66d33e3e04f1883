"""Pages of evaluations and catalogues: what they say, and how they behave in a browser (Chromium, if installed)."""

import base64
import importlib.util
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
from conftest import random_images
from PIL import Image
from test_encoder import MEAN, STD
from test_mae import small_config

import linear_probe_checkpoints
from galaxy_mae import figures
from galaxy_mae.catalogue.__main__ import main
from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation import probes
from galaxy_mae.model.mae import build_mae, save_encoder
from galaxy_mae.predictions.formats import read_catalogue, write_catalogue
from galaxy_mae.reports import evaluation_page
from galaxy_mae.reports import page as catalogue_page
from galaxy_mae.reports.galaxy_map import project

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
HOSTILE = "<script>window.ran = 1</script>"
CLASSES = [HOSTILE, "b & <b>c</b>", 'd "e"', "$$f$$"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def write_survey(folder: Path) -> Path:
    """Parquet files with a predefined test split, whose names of classes and galaxies hold HTML."""
    import datasets

    images, label = random_images(260) // 2, np.random.default_rng(0).integers(0, 4, 260)
    images += (25 * label).astype(np.uint8)[:, None, None, None]
    folder.mkdir()
    for part, rows in (("train", range(200)), ("test", range(200, 260))):
        columns = {
            "image": [Image.fromarray(images[i]) for i in rows],
            "label": [CLASSES[label[i]] for i in rows],
            "object_id": [f"<img src=x onerror='window.ran=1'> {i}" for i in rows],
            "ra": [float(i) for i in rows],
            "dec": [0.0] * len(rows),
        }
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{part}.parquet")
    return folder


def write_history(folder: Path) -> None:
    """What main.py leaves beside an encoder."""
    entries = [{"step": s, "epoch": s / 10, "loss": 1 / s, "learning_rate": 1e-3} for s in (10, 20, 30)]
    entries += [
        {"step": s, "epoch": s / 10, "eval_loss": 1.1 / s, "eval_online_knn_accuracy": s / 40} for s in (10, 20)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    (folder / "reconstructions").mkdir()
    for step in (10, 20, 30):
        Image.new("RGB", (300, 100), (step, 0, 0)).save(folder / "reconstructions" / f"step_{step:06d}.png")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Three of the five methods, and the page."""
    root = tmp_path_factory.mktemp("page")
    survey, run = write_survey(root / "survey"), root / "run"
    save_encoder(build_mae(small_config(), seed=11), run / "encoder", MEAN, STD, ())
    write_history(run)
    flags = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True"]
    flags += ["--batch_size", "32"]
    flags += ["--num_train_epochs", "1", "--learning_rate", "2e-3", "--seeds", "2", "--encoder", str(run)]
    flags += ["--dataset", str(survey), "--output_dir", str(root / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
        patch.setattr(probes, "ATTENTION_EPOCHS", 1)
        for method in ("zero_shot", "ssl_linear_probe", "ssl_fine_tune"):
            linear_probe_checkpoints.main([*flags, "--method", method])
        patch.setattr(figures, "_save", conftest.draw)
        write_report(root / "results")
    return root / "results"


def write_report(folder: Path, *flags: str) -> None:
    linear_probe_checkpoints.main(["--output_dir", str(folder), "--report", "--report_to", "none", *flags])


@pytest.fixture(scope="module")
def catalogue(results) -> Path:
    path, dataset = results.parent / "catalogue.parquet", str(results.parent / "survey")
    arguments = ["--dataset", dataset, "--model", str(results / "ssl_fine_tune"), "--embeddings", "--use_cpu"]
    main(["predict", *arguments, "--output", str(path)])
    return path


class _Reader(HTMLParser):
    """Texts of elements: rows of tables, items of lists, titles; and all attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.rows, self.texts, self.attributes, self._text, self._open = [], [], [], None, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "li", "h1", "h2", "p", "title", "dd", "option", "summary", "div"):
            self._text = ""

    def handle_data(self, data):
        if self._text is not None:
            self._text += data

    def handle_endtag(self, tag):
        if self._text is not None:
            self.texts.append(self._text)
            if tag in ("td", "th") and self.rows:
                self.rows[-1].append(self._text)
            self._text = None


def read(path: Path) -> tuple[str, _Reader]:
    html = path.read_text(encoding="utf-8")
    return html, _Reader(html)


def thumbnails(html: str) -> dict[int, dict]:
    """By the row of the galaxy."""
    found = json.loads(re.search(r'<script type="application/json" id="thumbnails">(.*?)</script>', html)[1])
    return {int(row): entry for row, entry in found.items()}


def titles(page: _Reader) -> set[str]:
    return {value for tag, name, value in page.attributes if tag == "section" and name == "id"}


# ----------------------------------------------------------------------------------------------------- what pages say


def test_every_number_of_the_report_is_in_the_page(results):
    """The rows of all tables, and all findings."""
    _, page = read(results / "report.html")
    report = re.sub(r"\\([<>_#*\[\]])", r"\1", (results / "report.md").read_text())  # without the escapes
    tables = [line for line in report.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    for line in tables:
        assert [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] in page.rows
    findings = [line.removeprefix("- ") for line in report.splitlines() if line.startswith("- ")]
    assert len(tables) > 20
    assert len(findings) >= 4
    for finding in findings:
        assert finding in page.texts
    assert "Linear probe (random weights): missing." in page.texts
    assert "missing: random_fine_tune" in report
    shown = {value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")}
    drawn = re.findall(r"!\[(.*)\]\((?!confusion_)", report)
    assert len(drawn) >= 3
    assert set(drawn) < shown


def test_a_page_loads_nothing_and_each_galaxy_is_once_in_it(results):
    html, page = read(results / "report.html")
    loaded = [
        value for tag, name, value in page.attributes if name in ("src", "srcset") or (tag, name) == ("link", "href")
    ]
    assert loaded
    assert all(value.startswith("data:") for value in loaded)
    assert "default-src 'none'" in html
    images = [entry["image"] for entry in thumbnails(html).values()]
    assert len(images) >= 60
    for image in images:
        assert html.count(image) == 1
    with Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1]))) as opened:
        assert opened.size == (32, 32)
    assert {"map", "confusion", "galaxies", "curves", "reconstructions", "attention", "foot"} <= titles(page)
    config = json.loads((results / "evaluation.json").read_text())
    for value in (config["dataset"], config["split"], config["encoder"]):
        assert any(value in text for text in page.texts)


def test_the_cells_hold_the_galaxies_of_the_predictions_most_confident_first(results):
    html, page = read(results / "report.html")
    best = max(
        ("zero_shot", "ssl_linear_probe", "ssl_fine_tune"),
        key=lambda x: json.loads((results / f"{x}.json").read_text())["accuracy"],
    )
    predictions = read_catalogue(results / f"{best}.parquet")
    cells = [json.loads(value) for _, name, value in page.attributes if name == "data-cell"][:16]
    for true, guess in np.ndindex(4, 4):
        votes = (predictions.predicted == guess).any(axis=0) & (predictions.label == true)
        probability = predictions.probabilities[:, guess]
        expected = sorted(np.flatnonzero(votes), key=lambda i: -probability[i])
        found = [thumbnails(html)[number]["lines"][0].split()[-1] for number, *_ in cells[4 * true + guess]]
        assert found == [str(predictions.row[i]) for i in expected]


def test_without_images_and_encoder_the_numbers_remain(results, tmp_path, monkeypatch):
    """A results folder on another machine; the page says what is missing and downloads nothing."""
    folder = tmp_path / "results"
    shutil.copytree(results, folder, ignore=shutil.ignore_patterns("seed_*"))
    config = json.loads((folder / "evaluation.json").read_text()) | {"dataset_name": "galaxy10", "encoder_name": "gone"}
    (folder / "evaluation.json").write_text(json.dumps(config))
    monkeypatch.setenv("GALAXY_MAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / f"{config['dataset'][:16]}_format5").mkdir(parents=True)  # left when the file was deleted
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GALAXY10_H5", raising=False)
    monkeypatch.setattr("galaxy_mae.data.kinds.find_galaxy10", None)
    write_report(folder)
    html, page = read(folder / "report.html")
    assert "Without images: --dataset galaxy10: not in the cache." in page.texts
    assert "Without map, neighbors and attention: --encoder gone: no such folder." in page.texts
    assert titles(page) >= {"results", "confusion", "galaxies", "foot"}
    assert not titles(page) & {"map", "attention", "curves", "reconstructions"}
    assert all(entry["image"] is None for entry in thumbnails(html).values())


def test_a_large_test_set_is_sampled_and_the_page_says_so(results, monkeypatch):
    monkeypatch.setattr(evaluation_page, "MAX_GALAXIES", 20)
    monkeypatch.setattr(evaluation_page, "_MAX_TRAINING", 10)
    report = results.parent / "sampled"
    shutil.copytree(results, report, ignore=shutil.ignore_patterns("seed_*"))
    write_report(report)
    html, page = read(report / "report.html")
    text = "The page shows a random sample of 20 of the 60 test galaxies; all numbers are of all test galaxies."
    assert text in page.texts
    shown = [entry["lines"][0].split()[-1] for entry in thumbnails(html).values()]
    assert len(shown) == len(set(shown))
    assert sum(int(row) >= 200 for row in shown) == 20


def test_page_of_a_catalogue(catalogue):
    main(["page", str(catalogue)])
    html, page = read(catalogue.with_suffix(".html"))
    assert titles(page) == {"classes", "map", "confusion", "galaxies", "foot"}
    assert len(thumbnails(html)) == 260


def rewrite(catalogue: Path, path: Path, change) -> _Reader:
    """The page of a changed catalogue."""
    found = read_catalogue(catalogue)
    table, about = change(found.table, dict(found.about))
    write_catalogue(path, [table], about)
    main(["page", str(path), "--output", str(path.with_suffix(".htm"))])
    return read(path.with_suffix(".htm"))[1]


def test_catalogues_without_labels_predictions_embeddings_or_with_one_class(catalogue, tmp_path):
    def without(*names):
        return lambda table, about: (table.drop_columns(list(names)), about)

    page = rewrite(catalogue, tmp_path / "unlabelled.parquet", without("label"))
    assert titles(page) == {"classes", "map", "galaxies", "foot"}
    page = rewrite(catalogue, tmp_path / "no_embeddings.fits", without("embedding"))
    assert titles(page) == {"classes", "confusion", "galaxies", "foot"}
    assert any("the catalogue has no embeddings" in text for text in page.texts)

    def encoder_alone(table, about):
        kept = [name for name in table.column_names if not name.startswith(("p_", "pred", "entropy", "disag", "label"))]
        return table.select(kept), about | {"class_names": []}

    page = rewrite(catalogue, tmp_path / "encoder.parquet", encoder_alone)
    assert titles(page) == {"map", "galaxies", "foot"}

    def one_class(table, about):
        kept = table.filter(np.asarray(table["label"]) == HOSTILE)
        names = [name for name in kept.column_names if name.startswith("p_") and "script" not in name]
        return kept.drop_columns(names), about | {"class_names": [HOSTILE]}

    page = rewrite(catalogue, tmp_path / "one.csv", one_class)
    assert titles(page) == {"classes", "map", "confusion", "galaxies", "foot"}

    def other_classes(table, about):
        return table.set_column(table.column_names.index("label"), "label", [["star"] * len(table)]), about

    page = rewrite(catalogue, tmp_path / "other.parquet", other_classes)
    assert "The labels are not compared: the model has no class star." in page.texts


def test_a_large_catalogue_is_sampled_and_the_page_says_so(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue_page, "MAX_GALAXIES", 30)
    page = rewrite(catalogue, tmp_path / "large.parquet", lambda table, about: (table, about))
    assert any("a random sample of 30 of the 260 galaxies" in text for text in page.texts)
    assert any(text.startswith("Map of 30 galaxies") for text in re.findall(r"Map of [^<]*", str(page.attributes)))


def test_wrong_flags_end_in_one_line(catalogue, tmp_path, capsys):
    existing = tmp_path / "page.html"
    existing.write_text("mine")
    cases = [
        ([str(tmp_path / "no.parquet")], "no such file"),
        (
            [str(catalogue), "--output", str(tmp_path / "page.pdf")],
            "its suffix names no format; use one of .html, .htm",
        ),
        ([str(catalogue), "--output", str(tmp_path / "no" / "page.html")], "there is no folder"),
        ([str(catalogue), "--output", str(existing)], "set --overwrite"),
        ([str(catalogue), "--dataset", str(tmp_path)], str(tmp_path)),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as exit_info, one_line_errors("page"):
            main(["page", *arguments])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert existing.read_text() == "mine"


def test_the_map_is_of_umap_if_it_is_installed_and_of_principal_components_otherwise(monkeypatch):
    """Of two far groups in a few dimensions; one dimension is constant."""
    rng = np.random.default_rng(0)
    embedding = np.concatenate([rng.normal(size=(40, 6)), 20 + rng.normal(size=(40, 6))]).astype(np.float32)
    embedding[:, 5] = 3
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "umap" else find_spec(name))
    xy, text = project(embedding)
    assert xy[:40, 0].max() < xy[40:, 0].min() or xy[:40, 0].min() > xy[40:, 0].max()
    assert "principal components" in text
    assert project(embedding[:2])[0].shape == (2, 2)
    assert project(np.ones((3, 1), np.float32))[0].tolist() == [[0, 0]] * 3

    class FakeUMAP:
        def __init__(self, n_neighbors, random_state, n_jobs): ...

        def fit_transform(self, values):
            return values[:, :2] + 100

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "umap" else find_spec(name))
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FakeUMAP))
    xy, text = project(embedding)
    assert xy.min() > 90
    assert text.startswith("UMAP")
    assert "principal" in project(embedding[:10])[1]  # fewer than UMAP's neighbors


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def show(browser, path: Path, width: int = 1280, dark: bool = False) -> None:
    """Open a page from disk, and wait until its plots are there."""
    from selenium.webdriver.support.ui import WebDriverWait

    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.resolve().as_uri())
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return document.body.dataset.ready === 'yes'"))


@pytest.fixture
def page(browser, results):
    show(browser, results / "report.html")
    return browser


def element(browser, selector: str):
    return browser.find_element("css selector", selector)


def elements(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


@needs_browser
def test_it_opens_without_an_error_or_a_request_and_runs_no_script_of_a_name(browser, results, catalogue):
    main(["page", str(catalogue)])
    for path in (results / "report.html", catalogue.with_suffix(".html")):
        browser.get("about:blank")
        browser.get_log("performance"), browser.get_log("browser")
        show(browser, path)
        element(browser, "[data-cell]:not([disabled])").click()
        errors = [entry for entry in browser.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")]
        assert errors == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert path.resolve().as_uri() in requests
        assert [url for url in requests if not url.startswith(("data:", "file:", "blob:"))] == []
        assert [url for url in requests if url.startswith("file:")] == [path.resolve().as_uri()]
        assert browser.execute_script("return window.ran") is None
        assert HOSTILE in element(browser, "table.matrix").text
        assert "onerror='window.ran=1'" in element(browser, ".galleries .galaxy").text


POINT = """
const plot = Bokeh.documents.map(d => d.get_model_by_name("map-plot")).find(Boolean), view = Bokeh.index.find_one(plot);
const source = Bokeh.documents.map(d => d.get_model_by_name("map-data")).find(Boolean);
const i = arguments[0], box = view.el.getBoundingClientRect();
view.el.scrollIntoView({block: "center"});
const now = view.el.getBoundingClientRect();
return [now.left + view.frame.x_scale.compute(source.data.x[i]), now.top + view.frame.y_scale.compute(source.data.y[i]),
  source.data.galaxy[i]];
"""
TOOLTIPS = """
const found = [];
const walk = node => {
  for (const child of node.querySelectorAll("*")) {
    const shown = child.className === "tip" && child.getBoundingClientRect().width;
    if (shown) found.push([child.textContent, child.querySelector("img").src]);
    if (child.shadowRoot) walk(child.shadowRoot);
  }
};
walk(document);
return found;
"""


def move_mouse(browser, *points: tuple[float, float], pressed: bool = False) -> None:
    """Move to the first point; then, with the button pressed if asked for, to the others."""
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser, duration=50)
    pointer = chain.w3c_actions.pointer_action
    pointer.move_to_location(*map(round, points[0]))
    if pressed:
        pointer.pointer_down()
    for point in points[1:]:
        pointer.move_to_location(*map(round, point))
    if pressed:
        pointer.pointer_up()
    chain.perform()


@needs_browser
def test_hovering_over_the_map_shows_the_galaxy(page):
    from selenium.webdriver.support.ui import WebDriverWait

    x, y, number = page.execute_script(POINT, 0)
    x, y, number = page.execute_script(POINT, 0)  # where it is after the page was scrolled
    move_mouse(page, (x - 3, y), (x, y))
    WebDriverWait(page, 10).until(lambda b: b.execute_script(TOOLTIPS))
    entry = page.execute_script("return thumbnails[arguments[0]]", number)
    assert ["".join(entry["lines"]), entry["image"]] in [
        [text.replace("\n", ""), src] for text, src in page.execute_script(TOOLTIPS)
    ]
    assert page.execute_script("return window.ran") is None


@needs_browser
def test_a_region_of_the_map_and_the_menu_show_their_galaxies(page):
    """The region by the mouse, the menu by the keyboard."""
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    page.execute_script(POINT, 0)
    box = page.execute_script(
        "const view = Bokeh.index.find_one(Bokeh.documents.map(d => d.get_model_by_name('map-plot')).find(Boolean));"
        "const r = view.el.getBoundingClientRect(), f = view.frame.bbox;"
        "return [r.left + f.left, r.top + f.top, r.left + f.right, r.top + f.bottom]"
    )
    left, top, right, bottom = box[0] + 2, box[1] + 2, box[2] - 2, box[3] - 2
    corners = [(left, top), (left, bottom), ((left + right) / 2, bottom), ((left + right) / 2, top), (left, top)]
    move_mouse(page, *corners, pressed=True)
    WebDriverWait(page, 10).until(lambda b: elements(b, "#selected .galaxy"))
    selected = page.execute_script(
        "return Bokeh.documents.map(d => d.get_model_by_name('map-data')).find(Boolean).selected.indices.length"
    )
    assert 0 < selected < 260
    assert element(page, "#selected h3").text == f"{selected} selected"
    assert len(elements(page, "#selected .galaxy")) == min(selected, 60)
    if selected > 60:
        element(page, "#selected .more").send_keys(Keys.ENTER)
        assert len(elements(page, "#selected .galaxy")) == selected
    menu = element(page, "#choose")
    menu.send_keys(Keys.ARROW_DOWN)
    option = page.execute_script("return arguments[0].selectedOptions[0].textContent", menu)
    count = int(re.fullmatch(r"misclassified \((\d+)\)", option)[1])
    assert element(page, "#selected h3").text == f"{count} selected"
    coloring = element(page, "#coloring")
    coloring.send_keys("by corr")
    shown = [legend.get_attribute("data-coloring") for legend in elements(page, ".legend") if legend.is_displayed()]
    assert shown == ["correct"]
    colors = page.execute_script(
        "return Bokeh.documents.map(d => d.get_model_by_name('map-data')).find(Boolean).data.color"
    )
    assert set(colors) == {"#0072b2", "#d55e00", "#8c8c8c"}


@needs_browser
def test_a_cell_opens_its_galaxies(page):
    """By the keyboard; the number in the title is that of the tiles' seeds."""
    from selenium.webdriver.common.keys import Keys

    cells = [cell for cell in elements(page, "details[open] [data-cell]") if cell.is_enabled()]
    for cell in cells[:2]:
        cell.send_keys(Keys.ENTER)
        gallery = element(page, "details[open] .galleries")
        assert gallery.find_element("css selector", "h3").text == cell.get_attribute("data-title")
        tiles = gallery.find_elements("css selector", ".galaxy")
        assert len(tiles) == len(json.loads(cell.get_attribute("data-cell"))) > 0
        assert all(
            image.get_attribute("src").startswith("data:image") for image in gallery.find_elements("tag name", "img")
        )


@needs_browser
def test_the_slider_shows_the_reconstructions_of_its_epoch(page):
    from selenium.webdriver.common.keys import Keys

    def shown() -> list[str]:
        return [frame.get_attribute("aria-label") for frame in elements(page, ".frame") if frame.is_displayed()]

    slider = element(page, "#epoch")
    assert shown() == ["epoch 3"]
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown() == ["epoch 2"]
    slider.send_keys(Keys.HOME)
    assert shown() == ["epoch 1"] == [slider.get_attribute("aria-valuetext")] == [element(page, "output").text]


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_the_page(browser, results, width, dark):
    from axe_core_python.selenium import Axe

    show(browser, results / "report.html", width, dark)
    for details in elements(browser, "details:not([open]) summary"):
        details.click()
    element(browser, "[data-cell]:not([disabled])").click()
    browser.execute_script("showSelection(Object.keys(thumbnails).slice(0, 2).map(Number))")
    found = Axe().run(browser)["violations"]
    serious = [
        (x["id"], [node["html"][:200] for node in x["nodes"][:3]])
        for x in found
        if x["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert (
        browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        <= 0
    )


@needs_browser
def test_printed_it_is_dark_on_white(browser, results):
    show(browser, results / "report.html", dark=True)
    text = "return getComputedStyle(document.body).color + getComputedStyle(document.querySelector('nav')).display"
    assert browser.execute_script(text) == "rgb(230, 233, 237)block"
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [scheme]})
    assert browser.execute_script(text) == "rgb(0, 0, 0)none"
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
