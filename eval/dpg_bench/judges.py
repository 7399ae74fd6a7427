"""Judges: models that answer a question about a picture.

A new judge is a subclass of `Judge` with a name and one of its two methods.

The official numbers come from mPLUG-large VQA. Numbers of another judge are not
comparable with them, and need a separate column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mmtensorar import devices
from mmtensorar.checkpoints.released import locate, weight_hash

DEFAULT = "Qwen/Qwen2.5-VL-7B-Instruct"
MPLUG = "damo/mplug_visual-question-answering_coco_large_en"
MAX_NEW_TOKENS = 8
INSTRUCTION = "Answer with one word, yes or no."


class Judge:
    """A subclass defines one of the two methods.

    name: identifies the weights and the question's form.
    """

    name: str

    def ask(self, image: Image.Image, question: str) -> str:
        """The answer to a question about an RGB picture; it counts if it is exactly
        "yes".
        """
        return self.ask_all(image, [question])[0]

    def ask_all(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """The answers to several questions about one picture."""
        return [self.ask(image, question) for question in questions]


def load(name: str, device: str | None = None) -> Judge:
    """A judge. Raises ValueError when it cannot be loaded.

    name: "mplug", or the folder or Hugging Face id of a vision-language model.
    """
    return MPlug(devices.pick(device)) if name == "mplug" else VisionLanguage.load(name, devices.pick(device))


class VisionLanguage(Judge):
    """A transformers model of the kind image-text-to-text, used with its processor's
    chat template.
    """

    def __init__(self, model, processor, name: str, device: torch.device, *, batch_size: int = 16):
        if getattr(processor, "chat_template", None) is None or not hasattr(processor, "tokenizer"):
            raise ValueError(f"--judge: {name} has no chat template; expected a vision-language chat model")
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor, self.device, self.batch_size = processor, device, batch_size
        # A batch is padded to its longest question, on the left: answers are generated
        # on the right.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        weights = f"{weight_hash(state)[:12]}, {str(model.dtype).removeprefix('torch.')}"
        self.name = f"{name} ({weights}), asked: question + {INSTRUCTION!r}"

    @classmethod
    def load(cls, path: str, device: torch.device) -> VisionLanguage:
        """path: a folder or Hugging Face id.

        Weights are bf16 on a GPU, float32 on a CPU.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = locate(path, key="--judge")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            processor = AutoProcessor.from_pretrained(folder)
            model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype=dtype)
        # Any exception: transformers expects valid configurations and weights.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"--judge: {path} cannot be loaded as a vision-language model ({reason})"
            ) from None
        return cls(model, processor, path, device)

    @torch.no_grad()
    def ask_all(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(questions), self.batch_size):
            chats = [self._chat(image, question) for question in questions[start : start + self.batch_size]]
            inputs = self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            ).to(self.device, self.model.dtype)
            try:
                output = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            except torch.OutOfMemoryError:
                raise ValueError(
                    f"the GPU has too little memory for {len(chats)} questions to {self.name}"
                ) from None
            new = output[:, inputs["input_ids"].shape[1] :]
            answers += [plain(text) for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return answers

    @staticmethod
    def _chat(image: Image.Image, question: str) -> list[dict[str, Any]]:
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "text", "text": f"{question} {INSTRUCTION}"},
                ],
            }
        ]


def plain(text: str) -> str:
    """A chat model's answer, such as "Yes.", in mPLUG's form: yes or no by the first
    word, else the text.
    """
    words = text.split()
    first = words[0].strip(".,;:!*\"'").lower() if words else ""
    return first if first in ("yes", "no") else text.strip()


class MPlug(Judge):
    """The official judge.

    ModelScope, which loads it, unpickles downloads: use it if you trust its hub.
    """

    def __init__(self, device: torch.device):
        try:
            from modelscope.pipelines import pipeline
            from modelscope.utils.constant import Tasks
        except ImportError as error:
            raise ValueError(f"--judge mplug needs ModelScope: pip install -e '.[mplug]' ({error})") from None
        try:
            self._pipeline = pipeline(
                Tasks.visual_question_answering, model=MPLUG, device="gpu" if device.type == "cuda" else "cpu"
            )
        except Exception as error:  # any: downloads and unknown files fail in many ways
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"--judge: {MPLUG} cannot be loaded ({reason})") from None
        # Without a hash of its weights: after a change on the hub, use another --out.
        self.name = f"mplug ({MPLUG})"

    def ask(self, image: Image.Image, question: str) -> str:
        """As the official script does: only the question, and the unchanged answer."""
        return self._pipeline({"image": image, "question": question})["text"]
