"""From a request of OpenAI's interface to sequences of the engine: prompts, chat templates, tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.base.errors import InputError
from trimtab.components.engine.server import protocol, tool_calls
from trimtab.components.engine.server.protocol import Chat, Completion
from trimtab.runtime.service.paged_engine import GenerationRequest
from trimtab.runtime.text.token_windows import encode


class Questions:
    """Makes the engine's requests out of those that come over HTTP.

    Args:
        longest: tokens of a sequence at most, the prompt among them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int):
        self._tokenizer, self._longest = tokenizer, longest
        self._tokenizing = asyncio.Lock()  # a fast tokenizer may not be entered twice
        #: In which form the model calls tools; "" where its chat template has none that is read.
        self.tools = tool_calls.form(tokenizer.chat_template)

    async def requests(self, asked: Completion | Chat) -> list[GenerationRequest]:
        """Returns a request for each choice, prompt by prompt.

        Raises:
            InputError: too many of them, no chat template, or text that is none.
        """
        chat = isinstance(asked, Chat)
        prompts = [self._dialogue(asked)] if chat else asked.prompts()
        if len(prompts) * asked.n > protocol.MAX_CHOICES:
            many = f"{len(prompts)} prompts times n {asked.n}"
            raise InputError(f"prompt: {many} are more than {protocol.MAX_CHOICES} answers; ask for fewer at once")
        made = []
        for prompt in prompts:
            tokens = prompt if isinstance(prompt, list) else await self._tokens(prompt, chat)
            most = asked.most or max(1, self._longest - len(tokens))
            for _ in range(asked.n):
                sampling = asked.sampling(len(made), asked.told)
                request = GenerationRequest(list(tokens), most, sampling=sampling, ignore_eos=asked.ignore_eos)
                request.prompt_logprobs = asked.told if asked.echoes else None
                made.append(request)
        return made

    def prompt_texts(self, asked: Completion | Chat, requests: list[GenerationRequest]) -> list[str]:
        """Returns what each answer of an echoing request begins with."""
        if not asked.echoes:
            return [""] * len(requests)
        given = [prompt for prompt in asked.prompts() for _ in range(asked.n)]
        pairs = zip(given, requests, strict=True)
        return [
            prompt if isinstance(prompt, str) else self._tokenizer.decode(request.tokens[: request.prompt_tokens])
            for prompt, request in pairs
        ]

    def _dialogue(self, asked: Chat) -> str:
        if not self._tokenizer.chat_template:
            raise InputError("messages: the model has no chat template; use /v1/completions")
        if not self.tools and (asked.offered or any(message.uses_tools for message in asked.messages)):
            what = "the model's chat template has no tools in a form that is read here; leave them out"
            raise InputError(f"{'tools' if asked.offered else 'messages'}: {what}")
        messages = [message.plain() for message in asked.messages]
        offered: dict[str, Any] = {"tools": [tool.plain() for tool in asked.offered]} if asked.offered else {}
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **offered)
        except Exception as error:  # templates raise what they like, such as on two turns of one role
            raise InputError(f"messages: the model's chat template refuses them: {error}") from None

    async def _tokens(self, text: str, chat: bool) -> list[int]:
        """Tokenises in another thread: a long text takes longer than the others should wait."""
        try:
            text.encode()
        except UnicodeEncodeError:
            what = "holds half of a surrogate pair, which is no character; write whole ones"
            raise InputError(f"{'messages' if chat else 'prompt'}: {what}") from None
        async with self._tokenizing:  # a template writes the special tokens itself
            return await asyncio.to_thread(encode, self._tokenizer, text, not chat)
