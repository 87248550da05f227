"""What the program of plans says of the bytes at each moment of backward, against replays."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Function, joint_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_matrix
from torch import Tensor, nn

import fxckpt
from bench.models import build
from fxckpt.columns import Columns, Rows
from fxckpt.living import Live
from fxckpt.logic import logic
from fxckpt.moment import Moment
from fxckpt.planner import Planner
from fxckpt.pool import Decision, Found
from fxckpt.search import Search
from fxckpt.solve import Floats

ROWS, WIDTH = 64, 8
ALL = 10**6  # steps that chains are followed
seeds, shares = st.integers(0, 2**32 - 2), st.floats(0, 1)


@functools.cache
def search_of(name: str) -> Search:
    """Of a small graph."""
    model, batch = MODELS[name]()
    rewritten = fxckpt.rewrite(model, "nothing", strict=True, example_inputs=batch)
    return Planner(joint_of(rewritten), device="v100")._searches[0]


def unet() -> tuple[nn.Module, Any]:
    """Skip connections and normalizations."""
    case = build("unet", layers=2, width=16, batch=4, image=64)
    return case.model, case.batch(0)


def chain() -> tuple[nn.Module, Any]:
    """Values that backward does not read, and some that it reads before what reads them."""

    def forward(m: Function, x: Tensor) -> Tensor:
        for _ in range(4):
            inner = (x @ m.weight) * 2.0 + 1.0
            x = x + ((inner.exp() * 2.0 + inner.sin()) @ m.weight) * 3.0
        return x.exp().sum()

    return Function(forward, WIDTH), (torch.ones(ROWS, WIDTH),)


MODELS = {"chain": chain, "unet": unet}
models = pytest.mark.parametrize("name", MODELS)


def some(search: Search, seed: int, share: float) -> Decision:
    """Some of the values."""
    chosen: Decision = np.random.default_rng(seed).random(len(search.pool.index)) < share
    return chosen


def decided(search: Search, saved: Decision, let_go: Decision) -> Found:
    """One that lets nothing go between its readers, and results of one operation together."""
    let_go = let_go[search._problem.producer]
    never = np.zeros(len(saved), dtype=bool)
    return search.pool.replay(np.concatenate([saved, let_go & ~saved, never]))


def columns_of(columns: Columns, decision: Decision) -> Floats:
    """The values of the columns that all moments have, for a decision."""
    n, m = columns.n, columns.m
    low, high = np.zeros(columns.count), np.ones(columns.count)
    low[:n] = high[:n] = decision[:n]
    high[n + m :] = 0  # but that one of several results is computed again
    high[columns.again[columns.several]] = 1
    rows = logic(columns)
    found = linprog(np.ones(columns.count), *inequalities(rows), bounds=np.stack([low, high], 1))
    more = np.zeros(m, dtype=bool)
    more[columns.problem.producer[decision[n : 2 * n]]] = True
    values: Floats = found.x.round()
    values[n + m : n + 2 * m] = more * values[n : n + m]
    return values


def inequalities(rows: Rows) -> tuple[csr_matrix, Floats]:
    """As `linprog` takes them."""
    shape = (len(rows.bounds), rows.columns)
    return csr_matrix((rows.x, (rows.i, rows.j)), shape=shape), np.array(rows.bounds)


def replayed(search: Search, found: Found) -> Floats:
    """The bytes at each moment of backward."""
    memory, pool = search.memory, search.pool
    at = {each.node: each.live for each in memory.replay(pool.choice(found.decision)).moments}
    return np.array([at[each.node] for each in memory.fixed.moments if each.phase != "forward"])


def least_by_rows(columns: Columns, values: Floats, moment: int) -> float:
    """The least bytes that the rows of a moment allow."""
    rows = Rows(columns.count)
    made = Moment(columns, rows, moment, ALL)
    live = made.live()
    costs = np.zeros(rows.columns)
    np.add.at(costs, [column for column, _ in live], [bytes_ for _, bytes_ in live])
    high = np.append(values, np.ones(rows.columns - columns.count))
    for v, column in made._waits.items():  # what is let go does not
        high[column] -= values[columns.n + columns.m + columns.problem.producer[v]]
    low = np.append(values, np.zeros(rows.columns - columns.count))
    found = linprog(costs, *inequalities(rows), bounds=np.stack([low, high], 1))
    return float(found.fun + columns.problem.backward[moment])


@models
@given(seeds, shares)
def test_what_is_said_of_decisions_is_exact(name: str, seed: int, share: float) -> None:
    """To the byte, if nothing runs again twice."""
    search = search_of(name)
    saved, columns = some(search, seed, share), search._exact._columns
    found = decided(search, saved, np.zeros_like(saved))
    live = Live(columns, columns_of(columns, found.decision)).backward()
    np.testing.assert_allclose(live, replayed(search, found), rtol=0, atol=1)


@models
@settings(max_examples=100)
@given(seeds, shares, shares)
def test_what_is_said_of_what_runs_again_twice(
    name: str, seed: int, share: float, let_go: float
) -> None:
    """It is never too much, and the rows say as much as what moments are found by."""
    search = search_of(name)
    found = decided(search, some(search, seed, share), some(search, seed + 1, let_go))
    columns = search._exact._columns
    values = columns_of(columns, found.decision)
    live = Live(columns, values).backward()
    assert (live <= replayed(search, found) + 1).all()
    moments = np.arange(seed % 3, len(live), 3)
    rows = [least_by_rows(columns, values, int(moment)) for moment in moments]
    np.testing.assert_allclose(rows, live[moments], rtol=0, atol=1)
