"""Blocks follow the task, the generator and the copied context; calls follow their thread."""

import asyncio
import contextvars
import gc
import math
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bayesify import (
    at_mean,
    draws,
    kl_divergence,
    one_draw,
    sampled,
    to_bbb,
    to_deterministic,
    torch_support,
)
from bayesify.priors import ScaleMixturePrior
from bayesify.scope import open_modes

X = torch.linspace(-1, 1, 6).view(2, 3)


def net() -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return to_bbb(plain, initial_std=math.exp(-1.0)).eval()


def given(model: nn.Module, seed: int | None) -> Tensor:
    """What the means, or the draw of a seed, give in any block: by the unconverted model."""
    with torch.no_grad():
        weights = {} if seed is None else draws(model, seed)
        out: Tensor = functional_call(to_deterministic(model), weights, (X,))
    return out


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    yield
    assert open_modes() == ()


# -- tasks -----------------------------------------------------------------------------------


def test_tasks_have_their_own_blocks() -> None:
    model = net()
    found: dict[Any, list[Tensor]] = {}

    async def seeded(seed: int) -> None:
        with one_draw(model, seed):
            for _ in range(3):
                await asyncio.sleep(0)
                found.setdefault(seed, []).append(model(X))

    async def mean() -> None:
        with at_mean(model):
            for _ in range(3):
                await asyncio.sleep(0)
                found.setdefault("mean", []).append(model(X))

    async def anew() -> None:
        with sampled(model):
            for _ in range(3):
                await asyncio.sleep(0)
                found.setdefault("anew", []).append(model(X))

    async def outside() -> None:
        for _ in range(5):
            await asyncio.sleep(0)
            found.setdefault("outside", []).append(model(X))

    async def main() -> None:
        await asyncio.gather(*map(seeded, range(4)), mean(), anew(), outside())
        assert torch.equal(model(X), given(model, None))

    with torch.no_grad():
        asyncio.run(main())
        for seed in range(4):
            assert all(torch.equal(y, given(model, seed)) for y in found[seed])
        for name in ("mean", "outside"):
            assert all(torch.equal(y, given(model, None)) for y in found[name])
        one, other, third = found["anew"]
        assert not torch.equal(one, other)
        assert not torch.equal(other, third)
        assert torch.equal(model(X), given(model, None))


def test_a_task_keeps_the_blocks_in_which_it_was_made() -> None:
    model = net()

    async def late() -> Tensor:
        await asyncio.sleep(0)
        out: Tensor = model(X)
        return out

    async def main() -> None:
        with one_draw(model, 3):
            task = asyncio.create_task(late())
            in_thread = await asyncio.to_thread(model, X)
        assert torch.equal(model(X), given(model, None))
        assert torch.equal(await task, given(model, 3))
        assert torch.equal(in_thread, given(model, 3))

    with torch.no_grad():
        asyncio.run(main())


def test_a_cancelled_task_leaves_nothing() -> None:
    model = net()

    async def waits() -> None:
        with one_draw(model, 1), at_mean(model[0]):
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert torch.equal(model(X), given(model, None))

    with torch.no_grad():
        asyncio.run(main())


# -- generators ------------------------------------------------------------------------------


def stream(model: nn.Module, seed: int) -> Generator[Tensor, None, None]:
    with one_draw(model, seed):
        while True:
            yield model(X)


@pytest.mark.parametrize("first", [0, 1])
def test_generators_remove_their_own_block(first: int) -> None:
    model = net()
    streams = [stream(model, 1), stream(model, 2)]
    with torch.no_grad():
        for seed, each in enumerate(streams, 1):
            # while it waits, a generator's block holds for whoever runs it
            assert torch.equal(next(each), given(model, seed))
        streams[first].close()
        assert torch.equal(model(X), given(model, 2 - first))
        streams[1 - first].close()
        assert torch.equal(model(X), given(model, None))


def test_a_generator_closed_in_another_context_ends_its_block() -> None:
    model = net()
    each = stream(model, 1)
    with torch.no_grad():
        assert torch.equal(next(each), given(model, 1))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(each.close).result()
        assert open_modes() == ()
        assert torch.equal(model(X), given(model, None))


def test_an_asynchronous_generator_left_early_ends_its_block() -> None:
    model = net()

    async def asynchronous() -> AsyncIterator[Tensor]:
        with one_draw(model, 1):
            while True:
                await asyncio.sleep(0)
                yield model(X)

    async def main() -> None:
        async for y in asynchronous():
            assert torch.equal(y, given(model, 1))
            break
        gc.collect()
        await asyncio.sleep(0.01)  # the loop closes it in a task of its own
        assert torch.equal(model(X), given(model, None))

    with torch.no_grad():
        asyncio.run(main())


# -- threads and contexts --------------------------------------------------------------------


def test_a_new_thread_is_outside_and_a_copied_context_inside() -> None:
    model = net()
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        with one_draw(model, 5):
            context = contextvars.copy_context()
            inside = pool.submit(context.run, torch.no_grad()(model), X).result()
            outside = pool.submit(torch.no_grad()(model), X).result()
        assert torch.equal(inside, given(model, 5))
        assert torch.equal(outside, given(model, None))
        assert torch.equal(context.run(model, X), given(model, 5))
        assert torch.equal(model(X), given(model, None))


def test_threads_of_one_block_share_its_draw() -> None:
    model = net()
    run: Callable[[Tensor], Tensor] = torch.no_grad()(model)
    with ThreadPoolExecutor(4) as pool, torch.no_grad(), one_draw(model, 6):
        contexts = [contextvars.copy_context() for _ in range(16)]
        found = list(pool.map(lambda context: context.run(run, X), contexts))
    assert all(torch.equal(y, given(model, 6)) for y in found)


def test_a_mixture_takes_the_draw_of_its_task() -> None:
    torch.manual_seed(0)
    model: Any = to_bbb(
        nn.Linear(3, 2), prior=ScaleMixturePrior(), initial_std=math.exp(-1.0)
    ).eval()
    with one_draw(model, 1):
        one = kl_divergence(model)
    with one_draw(model, 2):
        two = kl_divergence(model)

    async def kl(seed: int) -> Tensor:
        with one_draw(model, seed):
            await asyncio.sleep(0)
            return kl_divergence(model)

    async def main() -> list[Tensor]:
        return list(await asyncio.gather(kl(1), kl(2)))

    first, second = asyncio.run(main())
    assert torch.equal(first, one)
    assert torch.equal(second, two)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_in_the_blocks_of_its_forward(reentrant: bool) -> None:
    model = net()

    async def gradient(seed: int) -> Tensor:
        x = X.clone().requires_grad_()
        with one_draw(model, seed):
            await asyncio.sleep(0)
            out = checkpoint(model, x, use_reentrant=reentrant)
        await asyncio.sleep(0)
        with sampled(model):
            await asyncio.sleep(0)
            out.square().sum().backward()
        assert x.grad is not None
        return x.grad

    async def main() -> list[Tensor]:
        return list(await asyncio.gather(*map(gradient, range(3))))

    for seed, found in enumerate(asyncio.run(main())):
        x = X.clone().requires_grad_()
        functional_call(model, draws(model, seed), (x,)).square().sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(found, x.grad)


# -- torch.compile ---------------------------------------------------------------------------


def test_compiled_code_reads_the_blocks_of_its_task() -> None:
    model = net()
    compiler = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.no_grad():
        compiled(X)
        with one_draw(model, 9):
            compiled(X)
            compiled(X)  # finds what the first one drew
        graphs = compiler.frame_count
        assert graphs == (3 if torch_support.installed() > (2, 10) else 4)

        async def seeded(seed: int) -> None:
            with one_draw(model, seed):
                for _ in range(3):
                    await asyncio.sleep(0)
                    torch.testing.assert_close(compiled(X), given(model, seed))

        async def outside() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
                torch.testing.assert_close(compiled(X), given(model, None))

        async def main() -> None:
            await asyncio.gather(*map(seeded, range(4)), outside())

        asyncio.run(main())
    assert compiler.frame_count == graphs
