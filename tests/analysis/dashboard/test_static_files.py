"""The page's files: whole, from this service alone, and without ways for data to become markup."""

import re

import httpx
import pytest

from residua.analysis.dashboard.static_files import read_static_files

from ...support.services import running_service

FILES = read_static_files()
MODULES = [name for name in FILES if name.endswith(".js") and not name.startswith("vendor/")]


def text_of(name: str) -> str:
    return FILES[name].content.decode()


@pytest.mark.parametrize("name", MODULES)
def test_data_cannot_become_markup_or_code(name: str) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    assert not re.findall(ways, text_of(name))


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_files_that_are_there(name: str) -> None:
    imported = re.findall(r'^import [^"]*"\./([^"]+)";', text_of(name), re.MULTILINE)
    assert set(imported) <= set(FILES)
    for target in imported:
        names = re.search(rf'import \{{([^}}]*)\}} from "\./{re.escape(target)}"', text_of(name))
        for item in names[1].split(",") if names else ():
            word = item.split(" as ")[0].strip()
            if word:
                pattern = rf"export (?:async )?(?:function|const|class) {word}\b"
                assert re.search(pattern, text_of(target)), f"{target} exports no {word}"


def test_the_page_has_no_script_or_style_of_its_own_and_nothing_from_elsewhere() -> None:
    page = text_of("index.html")
    assert not re.findall(r"<style|style=|\son[a-z]+=|javascript:|https?://", page)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page) == [""]
    for name in re.findall(r'(?:src|href)="/static/([^"]+)"', page):
        assert name in FILES
    for name in (*MODULES, "dashboard.css"):
        addresses = re.findall(r"https?://[^\s\"')]+", text_of(name))
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, name


def test_uplot_comes_with_its_licence() -> None:
    assert "MIT" in text_of("vendor/uPlot-LICENSE.txt")
    assert "v1.6.32" in text_of("vendor/uPlot.esm.js")[:400]


def test_files_are_served_with_a_policy_and_asked_for_again_by_their_digest(tmp_path) -> None:
    with running_service(tmp_path) as server:
        page = httpx.get(f"{server.address}/", timeout=20)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        for name, file in FILES.items():
            answer = httpx.get(f"{server.address}/static/{name}", timeout=20)
            assert answer.content == file.content
            again = {"If-None-Match": answer.headers["etag"]}
            address = f"{server.address}/static/{name}"
            assert httpx.get(address, headers=again, timeout=20).status_code == 304
        for name in ("../static_files.py", "..%2fstatic_files.py", "%2e%2e/__init__.py", "none.js"):
            assert httpx.get(f"{server.address}/static/{name}", timeout=20).status_code in (
                400,
                404,
            )
