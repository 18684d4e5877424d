"""The official clients, unchanged, before the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.gateway.lab import Lab, make_lab

HELLO: Any = [{"role": "user", "content": "hi"}]


def official(lab: Lab) -> Any:
    """OpenAI's client, with its retries off so that a test sees each answer."""
    return openai.AsyncOpenAI(base_url=f"{lab.url}/v1", api_key="k", max_retries=0)


async def test_openai_chat(lab: Lab) -> None:
    """A chat completion, plain and streamed."""
    lab.model.light()
    async with official(lab) as client:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO)
        assert answer.choices[0].message.content == "Hello!"
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        assert "".join([chunk.choices[0].delta.content async for chunk in stream]) == "Hello!"


async def test_openai_streams_through_a_cold_start(lab: Lab) -> None:
    """The client passes over the comments of a wake and sees only the engine's events."""
    lab.model.lighting()

    async def light_up() -> None:
        # Begun by the comments, so that the stream has some.
        await lab.telemetry.until(lambda: lab.telemetry.queues.get("tiny") == (1, 0))
        await lab.model.until(lambda: lab.model.waiting == 1)

    lighting = asyncio.create_task(light_up())
    async with official(lab) as client:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        await lighting
        lab.model.light()
        assert "".join([chunk.choices[0].delta.content async for chunk in stream]) == "Hello!"


async def test_openai_completions_and_embeddings(lab: Lab) -> None:
    """The older routes, and vectors."""
    lab.model.light()
    async with official(lab) as client:
        assert (await client.completions.create(model="tiny", prompt="hi")).choices[0].text == "Hello!"
        answer = await client.embeddings.create(model="tiny", input="hi", encoding_format="float")
        assert answer.data[0].embedding == [0.5, -0.5]


async def test_openai_responses(lab: Lab) -> None:
    """A response, plain, streamed, and fetched again with its model in the query."""
    lab.model.light()
    async with official(lab) as client:
        answer = await client.responses.create(model="tiny", input="hi")
        assert answer.output_text == "Hello!"
        stream = await client.responses.create(model="tiny", input="hi", stream=True)
        kinds = [event.type async for event in stream]
        assert kinds == ["response.output_text.delta"] * 3 + ["response.completed"]
        again = await client.responses.retrieve("resp_1", extra_query={"model": "tiny"})
        assert again.output_text == "Hello!"


async def test_openai_models(lab: Lab) -> None:
    """The list and one model with a slash in its id."""
    async with official(lab) as client:
        assert [model.id async for model in client.models.list()] == ["tiny", "org/large"]
        assert (await client.models.retrieve("org/large")).id == "org/large"


async def test_openai_errors_have_their_classes() -> None:
    """Each of the gateway's errors is the client's own exception for it."""
    async with make_lab(limits={"max_queued": 1}) as lab, official(lab) as client:

        async def ask(**fields: object) -> None:
            await client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **fields})

        with pytest.raises(openai.NotFoundError) as unknown:
            await ask(model="none")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            await ask(model=7)
        waiting = asyncio.create_task(ask())
        await lab.model.until(lambda: lab.model.waiting == 1)
        with pytest.raises(openai.RateLimitError):
            await ask()
        waiting.cancel()
        await lab.quiet()
        with pytest.raises(openai.InternalServerError) as late:
            await ask(extra_headers={"X-Request-Timeout-Seconds": "0.05"})
        assert late.value.status_code == 504
        lab.model.fail("no room on any GPU")
        with pytest.raises(openai.InternalServerError, match="no room on any GPU"):
            await ask()


@pytest.mark.parametrize("kind", ["chat", "completions", "responses"])
async def test_openai_raises_on_errors_inside_a_stream(lab: Lab, kind: str) -> None:
    """An engine that dies in mid-stream is an APIError with the reason, after the events before it."""
    lab.model.light()
    lab.engine.script.die_after_chunks = 1
    async with official(lab) as client:
        if kind == "chat":
            stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        elif kind == "completions":
            stream = await client.completions.create(model="tiny", prompt="hi", stream=True)
        else:
            stream = await client.responses.create(model="tiny", input="hi", stream=True)
        seen = 0
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                seen += 1
        assert seen == 1


async def test_openai_raises_on_a_start_that_failed_after_comments(lab: Lab) -> None:
    """The engine's reason reaches the client's exception though the status was 200."""
    lab.model.lighting()
    async with official(lab) as client:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        lab.model.fail("weights not found")
        with pytest.raises(openai.APIError, match="weights not found"):
            async for _ in stream:
                pass


async def test_anthropic(lab: Lab) -> None:
    """Anthropic's client: a message, a stream, an error inside a stream, and an error before it."""
    lab.model.light()
    client: Any
    async with anthropic.AsyncAnthropic(base_url=lab.url, api_key="k", max_retries=0) as client:
        ask: Any = {"model": "tiny", "max_tokens": 5, "messages": HELLO}
        assert (await client.messages.create(**ask)).content[0].text == "Hello!"
        stream = await client.messages.create(**ask, stream=True)
        assert [event.type async for event in stream][-1] == "message_stop"
        lab.engine.script.die_after_chunks = 2
        stream = await client.messages.create(**ask, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="broke off"):
            async for _ in stream:
                pass
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**ask, "model": "none"})


async def test_litellm(lab: Lab) -> None:
    """LiteLLM as an OpenAI-compatible client, plain and streamed."""
    lab.model.light()
    ask: Any = {"model": "openai/tiny", "messages": HELLO, "api_base": f"{lab.url}/v1", "api_key": "k"}
    answer = await litellm.acompletion(**ask)
    assert answer.choices[0].message.content == "Hello!"
    stream = await litellm.acompletion(**ask, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello!"


async def test_langchain(lab: Lab) -> None:
    """LangChain's OpenAI chat model, plain and streamed."""
    lab.model.light()
    model = ChatOpenAI(model="tiny", base_url=f"{lab.url}/v1", api_key=SecretStr("k"), max_retries=0)
    assert (await model.ainvoke("hi")).content == "Hello!"
    assert "".join([str(chunk.content) async for chunk in model.astream("hi")]) == "Hello!"
