"""A model of a dozen tokens behind a server, for the tests of serving and of agents."""

import json

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rftjax.models import decoder
from rftjax.models.decoder import Config, Rope
from rftjax.sampler import device
from rftjax.sampler.engine import Engine
from rftjax.serving.app import App
from rftjax.serving.server import Background, listen
from rftjax.serving.service import Service
from rftjax.serving.tracing import Tracing
from rftjax.serving.turns import Model
from rftjax.text import tokenizer as tokenizers_of_models
from rftjax.types import SamplingParams

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<tool>", "<system>"]
CALL = '<tool_call>{"name":"look","arguments":{"at":"b"}}</tool_call>'
LETTERS = ["a", "b", "c", "ab", "bc", "abc"]
END = 1
TEMPLATE = (
    "{% if tools %}<system>{% for t in tools %}{{ t.function.name }}{% endfor %}<end>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = [*SPECIAL, CALL, *LETTERS]
CONFIG = Config(
    family="llama",
    vocab=len(VOCABULARY),
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    channels=8,
    ffn=16,
    max_positions=512,
    norm_eps=1e-6,
    rope=Rope(),
    tied=True,
    init_std=0.2,
)
KEY = "the key"
NAME = "tiny"


def make_tokenizer(directory, template=TEMPLATE):
    """A byte-pair tokenizer that writes "ab" as one token, while the model may sample "a" and "b"."""
    directory.mkdir(exist_ok=True)
    vocab = {token: index for index, token in enumerate(VOCABULARY)}
    model = models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c"), ("ab", "c")])
    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.Sequence([])
    built.decoder = decoders.Fuse()
    built.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    built.add_tokens([AddedToken(CALL, special=False)])
    built.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<end>", "pad_token": "<pad>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text("{}")
    return tokenizers_of_models.load(directory)


def make_weights():
    return device.sampler_params(CONFIG, decoder.init(CONFIG, jax.random.key(0)))


def make_engine(weights, **settings):
    settings = {"slots": 4, "parked": 4, "max_length": 120, "stops": [END]} | settings
    engine = Engine(CONFIG, prefill_chunk=8, dispatch_steps=4, seed=5, **settings)
    engine.set_params(weights)
    return engine


class Served:
    """A server on a free port; `engine`, `service`, `app` and `url` are its parts."""

    def __init__(self, engine, tokenizer, *, tracing=None, **limits):
        self.engine, self.service = engine, Service(engine)
        self.model = Model(NAME, tokenizer, (END,), (), engine.max_length)
        self.tracing = tracing or Tracing()
        limits = {"max_bytes": 20_000, "max_waiting": 1000} | limits
        params = SamplingParams(max_new_tokens=24)
        self.app = App(self.service, self.model, params, self.tracing, key=KEY, **limits)
        self.background = Background(self.app.routes(), listen("127.0.0.1", 0))
        self.url = self.background.url

    def close(self):
        self.background.close()
        self.service.stop()
