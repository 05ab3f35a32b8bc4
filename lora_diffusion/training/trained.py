"""All that a run trains: slots on the denoiser, on text encoders where it is told to, and new tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapter import Adapter
from lora_diffusion.attachment import Attachment
from lora_diffusion.methods import Course
from lora_diffusion.training.config import TrainConfig
from lora_diffusion.training.words import Words


class Courses:
    """Several attachments' courses as one."""

    def __init__(self, courses: Sequence[Course]) -> None:
        self.courses = list(courses)

    def penalty(self) -> Tensor:
        """The sum of what they add to the loss."""
        return torch.stack([course.penalty() for course in self.courses]).sum()

    def after(self, step: int) -> None:
        """What they do after optimiser step number `step`."""
        for course in self.courses:
            course.after(step)

    def enforce(self) -> None:
        """Put the parameters in order again."""
        for course in self.courses:
            course.enforce()


class Trained:
    """One or several attachments, and words, as if they were one attachment."""

    def __init__(self, denoiser: Attachment, encoders: Sequence[Attachment] = (), words: Words | None = None) -> None:
        self.denoiser, self.encoders, self.words = denoiser, list(encoders), words

    @property
    def attachments(self) -> list[Attachment]:
        """The denoiser's first."""
        return [self.denoiser, *self.encoders]

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The denoiser's by its layers' names, a text encoder's behind `<component>/`, tokens' behind `words/`."""
        yield from self.denoiser.named_parameters()
        for attachment in self.encoders:
            for name, parameter in attachment.named_parameters():
                yield f"{attachment.component}/{name}", parameter
        if self.words:
            yield from self.words.named_parameters()

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups; "ratio" in each is its rate over `train.lr`. Tokens do not decay."""
        loop, text = config.train, config.text
        groups = self.denoiser.groups(loop.lr, loop.up_ratio)
        for attachment in self.encoders:
            for group in attachment.groups(text.lr, loop.up_ratio):
                groups.append(group | {"ratio": group["ratio"] * text.lr / loop.lr})
        if self.words:
            rows, ratio = list(self.words.rows.values()), text.token_lr / loop.lr
            groups.append({"params": rows, "lr": text.token_lr, "ratio": ratio, "weight_decay": 0.0})
        return groups

    @property
    def course(self) -> Courses | None:
        """What methods do beside the optimiser; None where they do nothing."""
        found = [attachment.course for attachment in self.attachments if attachment.course]
        return Courses(found) if found else None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs, named as the parameters are."""
        state = self.denoiser.state()
        for attachment in self.encoders:
            state |= {f"{attachment.component}/{name}": tensor for name, tensor in attachment.state().items()}
        return state | ({name: p.detach() for name, p in self.words.named_parameters()} if self.words else {})

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.denoiser.restore(state)
        for attachment in self.encoders:
            start = f"{attachment.component}/"
            attachment.restore({name.removeprefix(start): t for name, t in state.items() if name.startswith(start)})
        for name, parameter in self.words.named_parameters() if self.words else ():
            parameter.copy_(state[name])

    def weigh(self, weight: float) -> None:
        """Turn it all to another strength; at 0 new tokens have the vectors that they began with."""
        for attachment in self.attachments:
            attachment.weigh(weight)
        if self.words:
            self.words.on = bool(weight)

    def at(self, noise: Tensor) -> None:
        """Tell methods that fade with it the noise of each picture of the next call: (batch,), 0 none, 1 all."""
        self.denoiser.at(noise)

    def cap(self, limit: float) -> None:
        """Bound the deltas of all pairs."""
        for attachment in self.attachments:
            attachment.cap(limit)

    def training(self, on: bool) -> None:
        """Dropout on or off."""
        for attachment in self.attachments:
            for slot in attachment.slots.values():
                slot.train(on)

    def adapter(self, name: str, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """A copy of all of it in the neutral form."""
        parts = [attachment.adapter(name, dtype=dtype) for attachment in self.attachments]
        layers = {component: layers for part in parts for component, layers in part.layers.items()}
        embeddings = self.words.embeddings() if self.words else {}
        return Adapter(name, layers, embeddings, metadata=parts[0].metadata)

    def detach(self) -> None:
        """Take everything off."""
        for attachment in self.attachments:
            attachment.detach()
        if self.words:
            self.words.detach()
