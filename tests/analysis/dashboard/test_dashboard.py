"""The dashboard in headless Chromium, with real clicks on a real service of the sample model."""

import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

import residua
from residua.analysis.service.demo_jobs import demo_settings
from residua.analysis.service.server import ServiceServer
from residua.analysis.web.service_settings import ServiceSettings
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.saved.library import new_probe_path
from residua.sample import MODEL_DIR, TEXT_PATH

from ...support.browser import Browser, open_browser, reason_without_browser
from ...support.services import running_service

REASON = reason_without_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"browser tests: {REASON}"),
]
HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
WAIT_SECONDS = 240


def extract(root: Path, tokens: int, **options: Any) -> ActivationCache:
    return residua.extract(
        MODEL_DIR, TEXT_PATH, root=root, context=256, max_tokens=tokens, progress=None, **options
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches of the sample model, one with a ridge probe and a basis."""
    folder = tmp_path_factory.mktemp("root")
    cache = extract(folder, 6144)
    residua.extract(MODEL_DIR, TEXT_PATH, root=folder, context=128, max_tokens=2048, progress=None)
    ridge = residua.RidgeProbe([0, 1, 2, 3]).fit(cache, progress=None)
    basis = residua.CausalBasis(k=3, layers=[2, 3], positions=512, test_positions=256)
    basis.fit(cache, ridge, progress=None)
    for probe in (ridge, basis):
        probe.save(new_probe_path(folder, probe, cache.id))
    return folder


def wait_for_job(server: ServiceServer, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_SECONDS
    found: dict[str, Any] = {}
    while time.monotonic() < deadline:
        found = httpx.get(f"{server.address}/v1/jobs/{job}", timeout=30).json()
        if found["state"] in ("done", "failed", "cancelled"):
            return found
        time.sleep(0.5)
    raise AssertionError(f"the job still runs: {found}")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[ServiceServer]:
    """A service with an evaluation and studies that it ran itself."""
    settings = demo_settings(ServiceSettings(root=root, state=root / ".service"))
    with running_service(root, jobs=True, models=settings.models, texts=settings.texts) as running:
        token = {"Authorization": f"Bearer {running.service.tokens.write}"}
        cache = largest_cache(root).id
        arguments = {"cache": cache, "probes": ["ridge"], "max_positions": 512}
        for command in ("evaluate", "study all"):
            request = {"command": command, "arguments": arguments}
            job = httpx.post(f"{running.address}/v1/jobs", json=request, headers=token, timeout=30)
            assert job.status_code == 201, job.text
            ended = wait_for_job(running, job.json()["id"])
            assert ended["state"] == "done", ended
        yield running


def largest_cache(root: Path) -> ActivationCache:
    caches = [ActivationCache(path.parent) for path in root.glob("*/manifest.json")]
    return max(caches, key=lambda cache: cache.positions)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with open_browser(1200, dark=False, downloads=tmp_path) as opened:
        yield opened
        assert opened.errors() == []


def wait_for_file(folder: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for path in folder.glob(pattern):
            if path.stat().st_size and path.suffix != ".crdownload":
                return path
        time.sleep(0.1)
    raise AssertionError(f"no file {pattern}: {list(folder.iterdir())}")


VIEWS: dict[str, tuple[str, Callable[[Browser], Any]]] = {
    "caches": ("#/caches", lambda page: page.find("tbody a.mono")),
    "cache": ("#/caches/CACHE", lambda page: page.find(".legend", "committed")),
    "jobs": ("#/jobs", lambda page: page.find("tbody", "evaluate")),
    "job": ("#/jobs/JOB", lambda page: page.find("pre", "KL")),
    "new job": ("#/jobs/new?command=fit%20ridge", lambda page: page.find("button", "Start fit")),
    "lens": (
        "#/lens?cache=CACHE&cell=4,3&sequence=3",
        lambda page: page.find("td button", "track"),
    ),
    "tracked": (
        "#/lens?cache=CACHE&probe2=logit&measure=rank&track_id=5",
        lambda page: page.wait(lambda: page.count(".map") == 3, "three maps"),
    ),
    "curves": ("#/curves", lambda page: page.find(".uplot canvas")),
    "storage": ("#/storage", lambda page: page.find("h2", "Everything")),
    "study": ("#/studies", lambda page: page.find("h2", "What it says")),
    "lenses": ("#/studies?study=tuned-lens", lambda page: page.find("h1", "layer by layer")),
    "basis": ("#/bases", lambda page: page.find("h2", "Direction 2")),
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_every_view_is_accessible_and_fits_the_screen(
    server: ServiceServer, root: Path, width: int, dark: bool
) -> None:
    job = httpx.get(f"{server.address}/v1/evaluations", timeout=30).json()["evaluations"][0]["job"]
    with open_browser(width, dark) as page:
        for name, (address, is_there) in VIEWS.items():
            place = address.replace("CACHE", largest_cache(root).id[:12]).replace("JOB", job)
            page.open(f"{server.address}/{place}")
            is_there(page)
            for summary in page.driver.find_elements("css selector", "main details summary")[:3]:
                summary.click()
            assert page.findings() == [], name
            assert page.overflow() <= 0, name
        assert page.errors() == []


def test_a_cell_gives_its_ten_tokens_and_a_token_is_tracked(
    server: ServiceServer, root: Path, browser: Browser, tmp_path: Path
) -> None:
    cache = largest_cache(root)
    browser.open(f"{server.address}/#/caches")
    browser.click("tbody a.mono", cache.id[:12])
    browser.click("a", "Read with a lens")
    browser.find(".map")

    # A search leads to a passage.
    browser.type("Search the texts of the cache", "return", "\n")
    browser.click(".matches button")
    browser.wait(lambda: "sequence=" in browser.driver.current_url, "passage in the address")

    # A click opens a cell; the keyboard goes to the next.
    browser.find(".map-cells")
    browser.click_at(".map-cells", 66 * 2 + 20, 74 + 24 * 1 + 8)
    browser.find("h2", "Layer 5")
    browser.wait(lambda: browser.count("td button") == 20, "ten tokens of lens and model")
    browser.press(".map", "\ue014", "\ue015", "\ue007")  # right, down, Enter
    browser.find("h2", "Layer 4")

    # The likeliest token of the cell is tracked: its rank stands in every cell.
    browser.click("td button", "track")
    browser.wait(lambda: "track=" in browser.driver.current_url, "tracked token in the address")
    browser.find("button", "Stop tracking")
    assert browser.labelled("Colour").get_attribute("value") == "rank"
    address = browser.driver.current_url

    # Its picture and numbers are those of the service.
    def count_tracked() -> bool:
        return "tracking" in (browser.find(".map").get_attribute("aria-label") or "")

    browser.wait(count_tracked, "map of the tracked token")
    for kind in ("SVG", "PNG", "CSV"):
        browser.click("main .actions button", kind)
    svg = ElementTree.parse(wait_for_file(tmp_path, "*.svg"))
    assert any(
        "tracking" in (text.text or "") for text in svg.iter("{http://www.w3.org/2000/svg}text")
    )
    assert wait_for_file(tmp_path, "*.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(wait_for_file(tmp_path, "*.csv").read_text().splitlines()))
    query = dict(
        part.split("=", 1) for part in address.split("?", 1)[1].split("&") if part.split("=", 1)[1]
    )
    assert query["track"].startswith("%23")
    answer = httpx.get(
        f"{server.address}/v1/lens-map",
        params={
            "cache": query["cache"],
            "probe": query["probe"],
            "sequence": query["sequence"],
            "first": query["first"],
            "tokens": query["tokens"],
            "track_id": query["track"].removeprefix("%23"),
        },
        timeout=60,
    ).json()
    expected = [rank for row in answer["values"]["rank"] for rank in row]
    assert [float(row["rank"]) for row in rows] == expected

    # The address gives the same view again.
    browser.open("about:blank")
    browser.open(address)
    browser.wait(count_tracked, "the same map")
    browser.find("h2", "Layer 4")
    browser.click("button", "Stop tracking")
    browser.wait(lambda: not count_tracked(), "map without a tracked token")


def test_two_lenses_and_two_caches_stand_side_by_side(
    server: ServiceServer, root: Path, browser: Browser
) -> None:
    browser.open(f"{server.address}/#/lens?cache={largest_cache(root).id[:12]}&sequence=0&first=4")
    browser.find(".map")
    browser.choose("Beside", "logit lens")
    browser.wait(lambda: browser.count(".map") == 3, "maps of both and of the difference")
    browser.choose("Beside", "logit lens of")
    browser.wait(
        lambda: browser.count(".map") == 3 or "different tokens" in browser.text(), "other cache"
    )
    assert "cache2=" in browser.driver.current_url
    browser.choose("Colour", "KL")
    browser.choose("Beside", "nothing")
    browser.wait(lambda: browser.count(".map") == 1, "one map")
    browser.choose("Offset N", "2")
    browser.wait(lambda: "offset=2" in browser.driver.current_url, "offset in the address")
    browser.wait(
        lambda: "N = 2" in (browser.find(".map").get_attribute("aria-label") or ""), "map at 2"
    )


def test_curves_show_probes_with_intervals(
    server: ServiceServer, browser: Browser, tmp_path: Path
) -> None:
    browser.open(f"{server.address}/#/curves")
    browser.find(".uplot canvas")
    browser.choose("Measure", "precision@1")
    browser.find("h2", "precision@1 at offset 0")
    browser.press(".chart", "\ue014", "\ue014")
    browser.find("output", "ridge")
    browser.click("main .actions button", "CSV")
    rows = list(csv.DictReader(wait_for_file(tmp_path, "*.csv").read_text().splitlines()))
    evaluation = httpx.get(f"{server.address}/v1/evaluations", timeout=30).json()["evaluations"][0]
    value = httpx.get(f"{server.address}/v1/evaluations/{evaluation['job']}", timeout=30).json()
    expected = [
        (row["layer"], row["precision_at_1"], row["precision_at_1_low"])
        for row in value["rows"]
        if row["probe"] == "ridge" and row["offset"] == 0
    ]
    found = [
        (int(row["layer"]), float(row["precision@1"]), float(row["low"]))
        for row in rows
        if row["line"] == "ridge"
    ]
    assert found == expected
    browser.choose("Against", "offset")
    browser.find("h2", "precision@1 at layer")
    browser.click("fieldset input[type=checkbox]")
    browser.wait(lambda: "hidden=" in browser.driver.current_url, "hidden probe in the address")
    browser.click("main .actions button", "SVG")
    ElementTree.parse(wait_for_file(tmp_path, "*.svg"))


def test_a_basis_shows_spectra_and_directions(server: ServiceServer, browser: Browser) -> None:
    browser.open(f"{server.address}/#/bases")
    browser.find("h2", "Direction 2")
    assert browser.count(".uplot") == 3
    browser.choose("Layer", "2")
    browser.find("h1", "layer 2")
    browser.find("h2", "Direction 0")
    assert browser.count(".token") >= 3 * 2 * 8


def test_a_study_shows_its_question_pictures_and_numbers(
    server: ServiceServer, browser: Browser, tmp_path: Path
) -> None:
    browser.open(f"{server.address}/#/studies")
    browser.choose("Part", "Lenses of")
    browser.find("h1", "layer by layer")
    browser.find("h2", "Question")
    browser.find("h2", "What it does not say")
    browser.find("h2", "What this cache cannot answer")
    assert browser.count(".uplot") >= 4
    assert browser.count("canvas[role=img]") >= 2
    browser.click("summary", "layers (")
    browser.find("tbody th", "ridge")
    browser.click("main .actions button", "CSV")
    rows = list(csv.DictReader(wait_for_file(tmp_path, "*.csv").read_text().splitlines()))
    assert {row["line"] for row in rows} >= {"logit", "ridge"}


def test_a_job_is_started_with_the_token_watched_and_cancelled(
    server: ServiceServer, root: Path, browser: Browser
) -> None:
    browser.open(f"{server.address}/#/jobs")
    browser.click("a", "Start a job")
    browser.choose("Command", "fit lens")
    browser.choose("cache (needed)", largest_cache(root).id[:12])
    browser.click("button", "Start fit lens")

    # Writing needs the token: a wrong one is refused, the right one starts the job.
    browser.type("Token", "wrong", "\n")
    browser.find("dialog .error", "not a token")
    browser.type("Token", server.service.tokens.write, "\n")
    browser.find("h1", "fit lens")
    browser.find("button", "Signed in (write)")
    browser.find(".state", "running")
    browser.wait(lambda: browser.count("main progress"), "progress", WAIT_SECONDS)
    browser.click("button", "Cancel the job")
    browser.find(".state", "cancelled")
    browser.click("nav a", "Jobs")
    browser.find("tbody tr", "cancelled")

    # A request that cannot be right gives the message of the command line.
    browser.open(f"{server.address}/#/jobs/new?command=fit%20ridge")
    browser.type("offsets", "nothing")
    browser.click("button", "Start fit ridge")
    browser.find("form .error, .card .error", "nothing")
    assert browser.errors(expected="status of 40") == []  # a browser notes every refusal


def test_the_grid_of_parts_follows_an_extraction(
    server: ServiceServer, root: Path, browser: Browser
) -> None:
    options: dict[str, Any] = {"part_positions": 512, "seed": 7}
    half = extract(root, 2048, part="1/2", **options)
    browser.open(f"{server.address}/#/caches/{half.id[:16]}")
    browser.find(".legend", "free 2")
    assert extract(root, 2048, **options).id == half.id
    browser.find(".legend", "committed 4")


def test_texts_of_strangers_stay_texts(
    server: ServiceServer, root: Path, browser: Browser, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{HOSTILE} {n} " * 9}) + "\n" for n in range(12)))
    cache = residua.extract(MODEL_DIR, texts, root=root, context=64, progress=None)
    browser.open(f"{server.address}/#/lens?cache={cache.id[:12]}&sequence=0&cell=6,4")
    browser.find("td button", "track")
    browser.type("Search the texts of the cache", "<script>", "\n")
    browser.find(".matches mark", "<script>")
    browser.click("summary")
    browser.find("table caption", "a row per layer")
    assert browser.count("main img, main script") == 0
    assert browser.driver.title == "Lenses – residua"


def test_the_theme_is_chosen_and_kept(server: ServiceServer, browser: Browser) -> None:
    browser.open(f"{server.address}/#/caches")
    browser.find("tbody a.mono")

    def background() -> str:
        script = "return getComputedStyle(document.body).backgroundColor"
        return str(browser.driver.execute_script(script))

    light = background()
    browser.click("button", "Theme: system")
    browser.click("button", "Theme: light")
    browser.find("button", "Theme: dark")
    assert background() != light
    browser.driver.refresh()
    browser.find("button", "Theme: dark")
    assert background() != light


def test_the_keyboard_alone_goes_through_the_page(server: ServiceServer, browser: Browser) -> None:
    browser.open(f"{server.address}/#/caches")
    browser.find("tbody a.mono")
    body = browser.driver.find_element("css selector", "body")
    body.send_keys("\t")
    assert browser.driver.switch_to.active_element.text == "Skip to the content"
    for _ in range(3):  # brand, Caches, Jobs
        browser.driver.switch_to.active_element.send_keys("\t")
    assert browser.driver.switch_to.active_element.text == "Jobs"
    browser.driver.switch_to.active_element.send_keys("\n")
    browser.find("h1", "Jobs")
    assert browser.driver.switch_to.active_element.text == "Jobs"


def test_what_takes_the_disk_is_pinned_removed_and_collected(
    server: ServiceServer, root: Path, browser: Browser
) -> None:
    cache = residua.extract(
        MODEL_DIR, TEXT_PATH, root=root, context=32, max_tokens=1024, progress=None
    )
    short = cache.id[:12]
    browser.open(f"{server.address}/#/storage")
    browser.click(f"button[aria-label='Pin {short}']")
    browser.type("Token", server.service.tokens.write, "\n")
    browser.find(f"button[aria-label='Unpin {short}']")

    # A pinned cache is not removed: the page says what names it.
    browser.click(f"button[aria-label='Remove {short}']")
    browser.click(f"button[aria-label='Remove {short}']", "?")
    browser.find(".error", "pin")
    assert cache.path.is_dir()

    browser.click(f"button[aria-label='Unpin {short}']")
    browser.find(f"button[aria-label='Pin {short}']")
    browser.click(f"button[aria-label='Remove {short}']")
    browser.click(f"button[aria-label='Remove {short}']", "?")
    browser.wait(lambda: not browser.count(f"button[aria-label='Remove {short}']"), "removal")
    assert not cache.path.exists()

    browser.click("button", "Show what would go")
    browser.find("form + div", "would go")
    assert browser.errors(expected="status of 40") == []  # a browser notes every refusal


def test_a_private_service_asks_for_its_token_once(tmp_path: Path) -> None:
    with running_service(tmp_path, private=True) as private, open_browser(1200, False) as page:
        page.open(f"{private.address}/#/lens")
        page.type("Token", private.service.tokens.read, "\n")
        page.find("button", "Signed in (read)")
        page.find("main p", "no complete cache")
        assert page.count("dialog[open]") == 0
        page.click("nav a", "Caches")
        page.find("main p", "No caches yet")
        assert page.errors(expected="status of 401") == []  # a browser notes every refusal
