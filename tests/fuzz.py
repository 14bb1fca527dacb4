"""``make fuzz``: one weight after the other against an oracle that shares no line with fastsn.

    python tests/fuzz.py --impl cpp reference --cases 10000 --seed 1
    python tests/fuzz.py --impl cpp --case '{"shape": [5, 3], "rounds": 3}'

For every case: W̄, the stored vectors (of some cases those of v first, too), the gradients by the weight and by a
learnt scale lie within the bounds of ``oracle``; the dtype and the shape are right; a second call from the same vectors
gives the same bits (for the kernels with another number of threads as well); evaluation moves nothing; the weight and
the scale are never written to, nor what lies beside the vectors, nor the W̄ of earlier cases that somebody holds. Where
the oracle claims nothing, vectors still have to be finite. The policies:

- The sign of u and v is that of the product; nothing is flipped.
- A product that is zero or not finite is not stored: the vector that was there stays, to the bit.
- sigma = 0 exactly: W̄ = c W, with the gradient c G. So a zero weight gives zeros, never NaN.
- A weight with a NaN or an infinite entry gives a W̄ that is not finite.
- Nothing is claimed where sigma or a gradient leaves the range of the dtype of the sums; where <G, W> does, which the
  kernels add up for a scale that is a tensor; and for a complex sigma that is subnormal: torch divides badly.

A failure prints the smallest case that fails as well. The last line says how often the oracle claimed something.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fuzz_cases
import oracle
from fuzz_cases import Case, drawn, simpler

IMPLS = ("reference", "cpp", "triton")
HELD = 8  # results at a time
THREADS = torch.get_num_threads()


class Failure(AssertionError):
    """What is wrong."""


class Fuzz:
    """``impl``: "triton" is its interpreter, which has to be in the place of the C++ kernels (``interpreted``)."""

    def __init__(self, impl: str) -> None:
        self.impl, self._kernels = "cpp" if impl == "triton" else impl, impl != "reference"
        self.claimed: collections.Counter[str] = collections.Counter()
        self._held: collections.deque[tuple[Tensor, Tensor]] = collections.deque()

    def check(self, case: Case) -> None:
        """Raises Failure, or what fastsn raises."""
        torch.set_num_threads(case.threads if self._kernels else 1)
        try:
            with np.errstate(all="ignore"):  # of cases for which nothing is claimed
                _Call(self, case).run()
        finally:
            torch.set_num_threads(THREADS)

    def hold(self, result: Tensor) -> None:
        """For the next cases, which may not write to it."""
        self._held.append((result, result.clone()))
        if len(self._held) > HELD:
            demand(same(*self._held.popleft()), "a W̄ that is held was written to")

    def smallest(self, case: Case) -> Case:
        """The smallest case that is found to fail like this one."""
        for attempt in simpler(case):
            if attempt != case and self._fails(attempt):
                return self.smallest(attempt)
        return case

    def _fails(self, case: Case) -> bool:
        self._held.clear()
        try:
            self.check(case)
        except Exception:
            return True
        return False


class _Call:
    def __init__(self, fuzz: Fuzz, case: Case) -> None:
        import fastsn

        self.fuzz, self.case = fuzz, case
        generator = torch.Generator().manual_seed(case.seed)
        self.weight = fuzz_cases.weight(case, generator).requires_grad_()
        self.vectors = fuzz_cases.vectors(case, self.weight, generator) if len(case.shape) > 1 else {}
        self.before = {view: (u.clone(), v.clone()) for view, (u, v) in self.vectors.items()}
        value = torch.tensor(case.scale_value, dtype=fuzz_cases.DTYPES[case.scale_dtype])
        scale: Any = {"float": case.scale_value, "tensor": value, "parameter": nn.Parameter(value)}[case.scale]
        self.norm = fastsn.SpectralNorm(
            self.weight, max(case.rounds, 1), case.dim, variant=case.variant, scale=scale, impl=fuzz.impl,
            follows_autocast=bool(case.autocast), vectors=self.vectors,
        ).train(case.rounds > 0)  # fmt: skip
        self.scale = torch.as_tensor(
            self.norm.scale, dtype=None if isinstance(scale, Tensor) else torch.float64
        ).detach()
        lowered = case.autocast and case.dtype in ("float32", "float16", "bfloat16") and len(case.shape) > 1
        self.dtype = fuzz_cases.DTYPES[case.autocast if lowered else case.dtype]
        self.gradient = fuzz_cases.gradient(case, self.dtype, generator)

    def run(self) -> None:
        case, constants = self.case, [self.weight, self.scale]
        copies = [x.detach().clone() for x in constants]
        results = self.results()
        w_bar = results[0]
        demand(w_bar.dtype == self.dtype, f"W̄ must be {self.dtype}, got {w_bar.dtype}")
        demand(w_bar.shape == self.weight.shape, f"W̄ must have shape {case.shape}, got {tuple(w_bar.shape)}")
        demand(all(map(same, constants, copies)), "the weight or the scale was written to")
        demand(
            all(fuzz_cases.guards_hold(x) for pair in self.vectors.values() for x in pair),
            "what lies beside u and v was written to",
        )
        if len(case.shape) == 1:
            self.one_dimension(results)
        else:
            self.stored()
            self.normalized(results)
            if case.v_first:
                self.iterated(self.v_first(), v_first=True)
        self.again(results)
        self.fuzz.hold(w_bar)

    def results(self) -> list[Tensor]:
        on = torch.autocast("cpu", getattr(torch, self.case.autocast)) if self.case.autocast else nullcontext()
        with on:
            w_bar = self.norm(self.weight)
        learnt = [self.norm.scale] if isinstance(self.norm.scale, nn.Parameter) else []
        return [w_bar.detach(), *torch.autograd.grad(w_bar, [self.weight, *learnt], self.gradient)]

    def stored(self) -> None:
        """The vectors in the norm are the tensors that were given, and those of the oracle."""
        found = self.norm.vectors()
        for view, pair in found.items():
            for name, got, given in zip("uv", pair, self.vectors[view], strict=True):
                demand(got is given, f"{name} of {view} must be the tensor that was given")
        self.iterated(found)

    def v_first(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The vectors after as many rounds of the other order, which a norm does not have."""
        from fastsn import ops, reference, views

        case, weight, before = self.case, self.weight.detach(), self.before
        dim = case.dim % weight.ndim
        if not self.fuzz._kernels:
            oik = views.as_oik(weight, dim)
            return reference.power_iteration([oik], [before], case.rounds, v_first=[True])[0]
        u, v = zip(*before.values(), strict=True)
        mask = sum(ops.VIEW_BITS[view] for view in before)
        _, flat = ops.power_iteration([weight], u, v, [dim], [mask], [1], case.rounds)
        parts = iter(flat.split([x.numel() for pair in before.values() for x in pair]))
        return {view: (next(parts), next(parts)) for view in before}

    def iterated(self, found: Mapping[str, tuple[Tensor, Tensor]], v_first: bool = False) -> None:
        """Vectors after the rounds of the case are those of the oracle."""
        case, r = self.case, oracle.Range.of(oracle.wide(self.weight.dtype))
        views = oracle.matrices(oracle.exact(self.weight), case.dim, case.variant)
        demand(list(found) == list(views), f"the views must be {list(views)}, got {list(found)}")
        for view, m in views.items():
            old = [oracle.exact(x) for x in self.before[view]]
            u, v, *off = oracle.iterate(m, old[0], old[1], case.rounds, r, v_first)
            for name, x, bound, got, start in zip("uv", (u, v), off, found[view], self.before[view], strict=True):
                what = f"{name} of {view}, v first," if v_first else f"{name} of {view}"
                demand(bool(got.isfinite().all()), f"{what} is not finite")
                self.count("vectors", math.isfinite(bound))
                if bound == 0:
                    demand(same(got, start), f"{what} must stay as it was")
                elif math.isfinite(bound):
                    error = float(np.linalg.norm(oracle.exact(got) - x))
                    demand(error <= bound, f"{what} is off by {error:.3g}, allowed {bound:.3g}")

    def normalized(self, results: list[Tensor]) -> None:
        """W̄ and the gradients are those of the oracle for the vectors in the norm."""
        case = self.case
        w, g = oracle.exact(self.weight), oracle.exact(self.gradient)
        if not bool(self.weight.isfinite().all()):
            demand(not bool(results[0].isfinite().all()), "W̄ of a weight that is not finite must not be")
            return
        pairs = {view: (oracle.exact(u), oracle.exact(v)) for view, (u, v) in self.norm.vectors().items()}
        kept = self.scale.dtype
        true = oracle.normalize(w, case.dim, pairs, float(self.scale), g, (self.weight.dtype, self.dtype, kept))
        r = oracle.Range.of(oracle.wide(self.weight.dtype))
        claims = true.relative < 0.1 and abs(true.sigma) < r.big / 4
        claims &= not self.weight.is_complex() or abs(true.sigma) > 4 * r.tiny  # where torch's division is right
        self.count("W̄", claims)
        if not claims:
            return
        close("W̄", results[0], true.weight)
        size = float(self.scale) / abs(true.sigma) if true.sigma else 1.0
        claims = bool(results[0].isfinite().all()) and r.tiny < size < r.big * r.tiny**0.5
        claims &= case.scale == "float" or float(np.sum(abs(g) * abs(w))) < r.big
        self.count("gradients", claims)
        if claims:
            close("the gradient of the weight", results[1], true.d_weight)
            if len(results) > 2:
                close("the gradient of the scale", results[2], true.d_scale)

    def one_dimension(self, results: list[Tensor]) -> None:
        demand(not list(self.norm.vectors()), "a 1-D weight has no vectors")
        length = float(torch.linalg.vector_norm(self.weight.detach().to(torch.complex128)))
        claims = 1e-12 < length < oracle.Range.of(oracle.wide(self.weight.dtype)).big ** 0.5
        self.count("W̄", claims)
        if claims:
            value = float(self.scale) * oracle.exact(self.weight) / length
            r, sums = oracle.Range.of(self.dtype), oracle.Range.of(oracle.wide(self.dtype))
            bound = abs(value) * (sums.sum_of(value.size) + 2 * r.eps) + 2 * r.small
            close("W̄", results[0], oracle.Bounded(value, bound))

    def again(self, results: list[Tensor]) -> None:
        """The same bits from the same vectors, as often as it is asked for."""
        after = [x.clone() for pair in self.norm.vectors().values() for x in pair]
        often = 8 if self.weight.numel() > 4096 and self.fuzz._kernels else 1
        for i in range(often):
            for view, pair in self.norm.vectors().items():
                for x, start in zip(pair, self.before[view], strict=True):
                    x.copy_(start)
            if self.fuzz._kernels and i % 2:
                torch.set_num_threads(1 + self.case.threads % 4)
            now = [x for pair in self.norm.vectors().values() for x in pair]
            repeated = self.results()
            demand(all(map(same, now, after)), "a second call stores other vectors")
            demand(all(map(same, repeated, results)), "a second call gives other bits")

    def count(self, what: str, claimed: bool) -> None:
        self.fuzz.claimed[what, claimed] += 1


def demand(condition: bool, message: str) -> None:
    if not condition:
        raise Failure(message)


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit."""
    whole = torch.contiguous_format
    return a.dtype == b.dtype and torch.equal(
        *(x.detach().clone(memory_format=whole).view(-1).view(torch.int16) for x in (a, b))
    )


def close(what: str, got: Tensor, true: oracle.Bounded) -> None:
    """Within the bound; beyond the largest number of the dtype, infinity is right as well."""
    demand(tuple(got.shape) == true.value.shape, f"{what} must have shape {true.value.shape}, got {tuple(got.shape)}")
    x, big = oracle.exact(got), torch.finfo(got.dtype).max
    over = abs(true.value) + true.off >= big * (1 - torch.finfo(got.dtype).eps)
    right = (abs(x - true.value) <= true.off) | (over & ~(abs(x) < big / 2))
    if not right.all():
        at = tuple(int(i[0]) for i in np.nonzero(~right)) if right.ndim else ()
        raise Failure(
            f"{what}[{at}] is {x[at]}, must be {true.value[at]} within {true.off[at]:.3g} ({(~right).sum()} wrong)"
        )


def run(impl: str, cases: int, seed: int, seconds: float = math.inf) -> tuple[Fuzz, list[tuple[Case, str]], int]:
    """The fuzz that was done, what failed with the reason, and how many cases fitted into the time."""
    fuzz, failures, begin = Fuzz(impl), [], time.monotonic()
    for i in range(cases):
        if time.monotonic() - begin > seconds:
            return fuzz, failures, i
        case = drawn(1_000_003 * seed + i, impl == "reference", interpreted=impl == "triton")
        try:
            fuzz.check(case)
        except Exception as error:
            failures.append((case, "".join(traceback.format_exception_only(error)).strip()))
    return fuzz, failures, cases


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz of the normalization of single weights.")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=["cpp", "reference"])
    parser.add_argument("--cases", type=int, default=10_000, help="for each implementation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="at most, for each implementation")
    parser.add_argument("--case", help="a single case, as a failure prints it")
    wanted = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    failed = False
    for impl in wanted.impl:
        with _in_place(impl):
            if wanted.case:
                Fuzz(impl).check(Case.parse(wanted.case))
                continue
            begin = time.monotonic()
            fuzz, failures, done = run(impl, wanted.cases, wanted.seed, wanted.seconds)
            for case, why in failures[:10]:
                print(f"FAILED {why}\n  --impl {impl} --case '{case}'")
            if failures:
                print(f"the smallest found:\n  --impl {impl} --case '{fuzz.smallest(failures[0][0])}'")
            took = time.monotonic() - begin
            shares = (f"{what} {fuzz.claimed[what, True]} of {sum(fuzz.claimed[what, x] for x in (True, False))}"
                      for what in dict.fromkeys(name for name, _ in fuzz.claimed))  # fmt: skip
            print(f"{impl}, seed {wanted.seed}: {done} cases, {len(failures)} failed, {took:.0f} s; "
                  f"bounded: {', '.join(shares)}", flush=True)  # fmt: skip
            failed |= bool(failures)
    return int(failed)


def _in_place(impl: str) -> Any:
    if impl != "triton":
        return nullcontext()
    import interpreted

    return interpreted.kernels()


if __name__ == "__main__":
    sys.exit(main())
