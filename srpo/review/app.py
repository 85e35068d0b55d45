"""The review pages: pick winners, browse candidates, compare blindly, see the results."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from srpo.errors import UserError
from srpo.review.browse import Filters, browse
from srpo.review.candidates import Images
from srpo.review.journal import check_rater
from srpo.review.pairs import on_the_left
from srpo.review.results import results
from srpo.review.security import Guard
from srpo.review.state import BadRequest, Review, link
from srpo.rounds import Round

KINDS = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "image/webp"))


def create_app(round: Round, against: str, token: str, cookie: str) -> Starlette:
    """Return the server of one round.

    Raises:
        UserError: the round has no candidates, or a file is damaged.
    """
    review = Review(round, against)
    pages = Environment(
        loader=PackageLoader("srpo.review"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["number"] = _number
    # `round` is a filter of jinja2, too, but filters and variables have names of their own
    pages.globals |= {"round": round.key, "against": against, "rewards": review.rewards, "link": link}

    def page(template: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(pages.get_template(template).render(**values))

    def home(request: Request) -> Response:
        rater = request.query_params.get("rater", "")
        counts = {}
        if rater:
            rater = check_rater(rater)
            counts = {kind: review.progress(kind, rater) for kind in review.journals}
        return page("home.html", rater=rater, counts=counts, review=review)

    def pick(request: Request) -> Response:
        rater, progress, item = _place(review, "picks", request)
        if item is None:
            return page("done.html", rater=rater, kind="picks", progress=progress)
        if "item" not in request.query_params:
            return RedirectResponse(link("/pick", rater=rater, item=item, scores=request.query_params.get("scores")))
        rows, upcoming = review.prompts[item].to_dicts(), review.next_after("picks", rater, item)
        return page(
            "pick.html",
            rater=rater,
            rows=rows,
            decided=progress["decided"].get(item),
            progress=progress,
            scores=request.query_params.get("scores") == "1" and bool(review.rewards),
            preload=[] if upcoming in (None, item) else review.prompts[upcoming]["place"].to_list(),
            **_neighbors(review, "picks", item),
        )

    def compare(request: Request) -> Response:
        if review.no_pairs:
            return page("none.html", rater=request.query_params.get("rater", ""), text=review.no_pairs)
        rater, progress, item = _place(review, "votes", request)
        if item is None:
            return page("done.html", rater=rater, kind="votes", progress=progress)
        if "item" not in request.query_params:
            return RedirectResponse(link("/compare", rater=rater, item=item))
        upcoming = review.next_after("votes", rater, item)
        return page(
            "compare.html",
            rater=rater,
            pair=review.pairs[review.items["votes"].index(item)],
            number=review.items["votes"].index(item),
            decided=progress["decided"].get(item),
            progress=progress,
            preload=None if upcoming in (None, item) else review.items["votes"].index(upcoming),
            **_neighbors(review, "votes", item),
        )

    def browse_page(request: Request) -> Response:
        filters = Filters.of(request.query_params, review.rewards)
        return page("browse.html", rater=request.query_params.get("rater", ""), **browse(review.candidates, filters))

    def results_page(request: Request) -> Response:
        rater = request.query_params.get("rater", "")
        return page("results.html", rater=rater, tables=results(round))

    async def decide(request: Request) -> Response:
        data, kind = await request.json(), request.path_params["kind"]
        save = {"picks": review.save_pick, "votes": review.save_vote}.get(kind)
        return await _answer(save, data)

    async def undo(request: Request) -> Response:
        data, kind = await request.json(), request.path_params["kind"]
        return await _answer(partial(review.undo_last, kind) if kind in review.journals else None, data)

    def candidate_image(request: Request) -> Response:
        return _image(review.images, request.path_params["place"])

    def pair_image(request: Request) -> Response:
        number, side = request.path_params["number"], request.path_params["side"]
        if number >= len(review.pairs) or side not in ("left", "right"):
            return PlainTextResponse("no such image", 404)
        pair, rater = review.pairs[number], check_rater(request.query_params.get("rater", ""))
        model = on_the_left(pair, round.key, rater) ^ (side == "right")
        return _image(review.samples[model], pair.places[model])

    routes = [
        Route("/", home),
        Route("/pick", pick),
        Route("/compare", compare),
        Route("/browse", browse_page),
        Route("/results", results_page),
        Route("/candidate/{place:int}", candidate_image),
        Route("/pair/{number:int}/{side}", pair_image),
        Route("/decide/{kind:str}", decide, methods=["POST"]),
        Route("/undo/{kind:str}", undo, methods=["POST"]),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token, cookie=cookie)],
        exception_handlers={UserError: _bad, BadRequest: _bad, JSONDecodeError: _bad, OSError: _not_written},
    )


async def _answer(save: Callable[[object], str | None] | None, data: object) -> Response:
    """Return the address of the next page once the decision is on the disk."""
    if save is None:
        return PlainTextResponse("no such kind of decision", 404)
    return JSONResponse({"next": await run_in_threadpool(save, data)})


def _bad(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error) or "bad request", 400)


def _not_written(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"not saved: {getattr(error, 'strerror', None) or error}", 507)


def _place(review: Review, kind: str, request: Request) -> tuple[str, dict[str, Any], str | None]:
    """Return the rater, the rater's progress, and the item asked for or, without one, where the rater stopped."""
    rater = check_rater(request.query_params.get("rater", ""))
    progress = review.progress(kind, rater)
    item = request.query_params.get("item", progress["first"])
    if item is not None and item not in review.items[kind]:
        raise UserError(f"{item}: no such item in this round")
    return rater, progress, item


def _neighbors(review: Review, kind: str, item: str) -> dict[str, Any]:
    items = review.items[kind]
    at = items.index(item)
    return {
        "item": item,
        "position": at + 1,
        "previous": items[at - 1] if at else None,
        "following": items[at + 1] if at + 1 < len(items) else None,
    }


def _image(images: Images, place: int) -> Response:
    try:
        data = images.bytes_at(place)
    except IndexError:
        data = None
    if data is None:
        return PlainTextResponse("no such image", 404)
    kind = next((kind for start, kind in KINDS if data.startswith(start)), "application/octet-stream")
    # not kept on the disk, but the next prompt's images are loaded ahead
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=600"})


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"
