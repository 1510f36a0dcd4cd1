"""A model that decodes through the daemon."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .._arrays import dtype_of
from ..errors import Error, InvalidArgument, Unsupported
from ..geometry import Geometry
from ..session import Client, Config, Session, dial
from ._cache import NO_BEAMS, Prefill, SidecarCache, SidecarLayer
from ._memory import PAGE, Slab
from .budgets import Budgets, Recorder

log = logging.getLogger("twilight_client")

_BASES = ("sdpa", "eager")  # attention of the model's own that prefill and fallback can use
_QUERY_BLOCK = 256  # of the prefill whose mass is summed at a time


def enable(
    model: PreTrainedModel,
    target: str | Client,
    config: Config = None,
    *,
    fallback: Literal["own", "raise"] = "own",
    armed: bool | None = None,
    engine_name: str = "",
    device: str = "",
    max_tokens: int = 0,
) -> Twilight:
    """Let a model decode through the daemon at ``target``, as in ``unix:///run/twilight/twilightd.sock``.

    ``config`` is a Twilight config: a mapping, JSON or the path of a file; None takes the daemon's default.
    ``fallback`` says what happens while the daemon is away: "own" attends by the model, "raise" raises the error.
    ``armed`` steps meet the daemon at words in shared memory rather than by a message a layer; None where the device
    offers them. ``device`` is one of the daemon's, "" the only one. ``max_tokens`` is room for keys and values, over
    all sequences, that is made at once; more is made as it is needed.

    The model's ``twilight`` attribute is the result; :func:`disable` undoes everything.
    """
    if isinstance(getattr(model, "twilight", None), Twilight):
        raise InvalidArgument("the model decodes through a daemon already; call disable first")
    if fallback not in ("own", "raise"):
        raise InvalidArgument(f'is {fallback!r}; "own" or "raise"', field="fallback")
    twilight = Twilight(model, target, config, fallback, armed, engine_name or type(model).__name__, device)
    try:
        if max_tokens > 0:
            twilight.give_back(twilight.take(-(-max_tokens // PAGE)), [])
        twilight.install()
    except BaseException:
        twilight.close()
        raise
    return twilight


def disable(model: PreTrainedModel) -> None:
    """Let a model attend by itself again, and end its lease. Without effect on a model that is not enabled."""
    twilight = getattr(model, "twilight", None)
    if isinstance(twilight, Twilight):
        twilight.close()


class Twilight:
    """What makes a model decode through the daemon; its ``twilight`` attribute.

    While the daemon is away, the model attends by itself: the logger ``twilight_client`` warns when that begins, and
    tells when the daemon serves again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        target: str | Client,
        config: Config,
        fallback: str,
        armed: bool | None,
        engine_name: str,
        device: str,
    ) -> None:
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        self._base: str = self._config._attn_implementation or "eager"
        self._fallback = fallback
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._free: list[Slab] = []
        self._used: list[Slab] = []
        self._closed = False
        self._said: set[str] = set()
        self._away = False
        self._last: Recorder | None = None
        self._caches: Any = None
        self.alone = False
        """Whether the model is to attend by itself: a forward is done again."""
        self.fallbacks = 0
        """Layers of decode steps that the model attended by itself, though the daemon should have served them."""

        self.layers, geometry = _geometry(model, self._config, self._base)
        self._client: Client | None = None
        if isinstance(target, Client):
            client = target
        else:
            client = self._client = dial(target)
        try:
            self.session: Session = client.open(geometry, config, engine_name=engine_name, device=device)
        except BaseException:
            if self._client is not None:
                self._client.close()
            raise
        self.armed = self.session.device.armed_steps if armed is None else armed
        self._window, self._wants_mass = _observes(json.loads(self.session.config))

    def budgets(self) -> Budgets:
        """Return what every head kept in the last ``generate``, or with the last cache that was made."""
        cache = self._caches() if self._caches is not None else None
        if cache is not None:
            cache.flush()
        recorder = self._last or Recorder(self.layers, self.session.geometry.query_heads)
        return recorder.budgets()

    def new_cache(self, max_length: int = 0) -> SidecarCache:
        """Return a cache for calls of the model's forward; ``generate`` makes its own.

        ``max_length`` is how many tokens a row may come to; beyond it, what it holds is moved. It may live as long as
        the caller likes; ``release()``, or its end, gives the memory back.
        """
        layers = DynamicCache(config=self._config).layers
        cache = SidecarCache(self, layers, max_length)
        self._caches, self._last = weakref.ref(cache), cache.recorder
        return cache

    def close(self) -> None:
        """Undo :func:`enable`, and end the lease."""
        if self._closed:
            return
        self._closed = True
        model = self._model
        if getattr(model, "twilight", None) is self:
            del model.twilight
            for name in ("generate", "forward"):
                vars(model).pop(name, None)
            _set_attention(model, self._config, self._base)
        self.session.close()
        if self._client is not None:
            self._client.close()

    def __enter__(self) -> Twilight:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def install(self) -> None:
        """Register the attention and let the model use it."""
        name = f"twilight_{self._base}"
        AttentionInterface.register(name, functools.partial(_attention, self._base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self._base])
        _set_attention(self._model, self._config, name)
        self._model.generate = MethodType(_generating(type(self._model).generate), self._model)  # type: ignore[method-assign]
        self._model.forward = MethodType(_forwarding(type(self._model).forward), self._model)  # type: ignore[method-assign]
        self._model.twilight = self  # type: ignore[assignment]

    def take(self, pages: int) -> Slab:
        """Return lent memory of at least so many pages of every layer."""
        with self._lock:
            for slab in self._free:
                if slab.pages >= pages:
                    self._free.remove(slab)
                    self._used.append(slab)
                    return slab
            smaller, self._free = self._free, []
        for slab in smaller:
            slab.close()
        slab = Slab(self.session, self.layers, pages, self._model.device)
        with self._lock:
            self._used.append(slab)
        return slab

    def give_back(self, slab: Slab, ids: list[int]) -> None:
        """Take memory back, and the sequences that it was used for."""
        with self._lock:
            slab.ended.extend(slab.started.intersection(ids))
            slab.started.difference_update(ids)
            if slab in self._used:
                self._used.remove(slab)
                self._free.append(slab)

    def new_id(self) -> int:
        """Return a name for a sequence."""
        return next(self._ids)

    def away(self, error: Error) -> None:
        """Book that the daemon did not serve a layer, or raise the reason."""
        if self._fallback == "raise":
            raise error.with_traceback(None)
        if not self._away:
            self._away = True
            log.warning("the model attends by itself while the daemon is away: %s", error)

    def present(self) -> None:
        """Book that the daemon served a layer."""
        if self._away:
            self._away = False
            log.warning("the daemon is back: the model attends through it again")

    def leave(self, why: str) -> None:
        """Say, once, why layers are left to the model."""
        if why not in self._said:
            self._said.add(why)
            log.warning("the model attends by itself: %s", why)

    def observe(self, layer: SidecarLayer, query: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Keep of a prefill's queries, [B, Hq, new, dim], what the config's methods want to see."""
        if not self._window and not self._wants_mass:
            return
        before = layer.prefill or Prefill(None, None)
        queries = mass = None
        if self._window:
            new = query[:, :, -self._window :].transpose(1, 2)
            queries = new if before.queries is None else torch.cat([before.queries, new], 1)
            queries = queries[:, -self._window :].contiguous()
        if self._wants_mass and layer.keys is not None:
            mass = _mass(query, layer.keys, mask, self.session.geometry.scale)
            if before.mass is not None:
                mass[:, :, : before.mass.shape[2]] += before.mass
        layer.prefill = Prefill(queries, mass)


def _geometry(model: PreTrainedModel, config: Any, base: str) -> tuple[list[int], Geometry]:
    """Return the layers that the daemon can serve, and their shape."""
    if base not in _BASES:
        raise Unsupported(f"attn_implementation is {base!r}; load the model with one of {', '.join(_BASES)}")
    attentions: list[Any] = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    modules = {m.layer_idx: m for m in attentions}
    layers = [
        i
        for i, layer in enumerate(DynamicCache(config=config).layers)
        if type(layer) is DynamicLayer and i in modules and not getattr(modules[i], "is_sliding", False)
    ]
    name = type(model).__name__
    if not layers:
        raise Unsupported(f"{name} has no layer of full attention through AttentionInterface; it cannot be served")
    served = [modules[i] for i in layers]
    if any(getattr(m, "sinks", None) is not None for m in served):
        raise Unsupported(f"{name} has attention sinks that differ by layer; a lease has one for all")
    shapes = {(m.scaling, getattr(m, "head_dim", 0), getattr(m, "attn_logit_softcapping", None)) for m in served}
    if len(shapes) != 1:
        raise Unsupported(
            f"the layers of {name} differ in head size, scale or softcap: {shapes}; a lease has one for all"
        )
    scale, head_dim, softcap = shapes.pop()
    query_heads = config.num_attention_heads
    return layers, Geometry(
        layers=len(layers),
        query_heads=query_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
        k_dim=head_dim or config.hidden_size // query_heads,
        scale=scale,
        softcap=softcap or 0.0,
        query=dtype_of(torch.empty(0, dtype=model.dtype)),
    )


def _observes(config: dict[str, Any]) -> tuple[int, bool]:
    """Return how many of a prefill's last queries a config's methods look at, and whether they want its mass."""
    compressor = config.get("compressor", {})
    window = int(compressor.get("window_size", 0)) if compressor.get("type") == "snap_kv" else 0
    return window, config.get("selector", {}).get("type") == "h2o"


def _set_attention(model: PreTrainedModel, config: Any, name: str) -> None:
    """Set the attention of a model's text part."""
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is config:
            model.set_attn_implementation({key: name})
            return
    model.set_attn_implementation(name)


def _attention(
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend: the function that transformers calls. Query, key and value are [B, heads, tokens, dim]."""
    layer = getattr(key, "sidecar_layer", None)
    if isinstance(layer, SidecarLayer):
        cache = layer.cache
        if query.shape[2] == 1 and layer.length > 1:
            output = cache.attend(layer, query, attention_mask)
            if output is not None:
                return output, None
        else:
            cache.twilight.observe(layer, query, attention_mask)
    own: Callable[..., Any]
    if base == "eager":
        own = sys.modules[type(module).__module__].eager_attention_forward
    else:
        own = AttentionInterface()[base]
    return own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _mass(query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return the softmax weight that each position gets from a prefill's last queries: float32 [B, Hq, tokens]."""
    batch, heads, new, _ = query.shape
    tokens = keys.shape[2]
    keys = keys.repeat_interleave(heads // keys.shape[1], 1).float()
    mass = torch.zeros(batch, heads, tokens, device=query.device)
    positions = torch.arange(tokens, device=query.device)
    for start in range(0, new, _QUERY_BLOCK):
        block = query[:, :, start : start + _QUERY_BLOCK].float()
        end = start + block.shape[2]
        allowed = positions <= (tokens - new + torch.arange(start, end, device=query.device))[:, None]
        if mask is not None:
            part = mask[:, :, start:end, :tokens]
            allowed = allowed & (part if part.dtype == torch.bool else part == 0)
        logits = (scale * block @ keys.transpose(2, 3)).masked_fill(~allowed, -torch.inf)
        mass += logits.softmax(-1).nan_to_num(0).sum(2)  # a padding's query attends to nothing
    return mass


def _forwarding(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``forward`` so that a decode step whose outputs failed, after a stream took them, is done again."""

    @functools.wraps(forward)
    def forwarding(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        twilight = model.twilight
        assert isinstance(twilight, Twilight)  # noqa: S101 - enable set both
        output = forward(model, *args, **kwargs)
        cache = next((kwargs[name] for name in _CACHES if isinstance(kwargs.get(name), SidecarCache)), None)
        if cache is None or cache.settled():
            return output
        cache.crop(-1)
        twilight.alone = True
        try:
            return forward(model, *args, **kwargs)
        finally:
            twilight.alone = False

    return forwarding


def _generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``generate`` so that it is given a cache in lent memory."""

    @functools.wraps(generate)
    def generating(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        twilight = model.twilight
        assert isinstance(twilight, Twilight)  # noqa: S101 - enable set both
        settings = kwargs.get("generation_config") or model.generation_config

        def setting(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(settings, name, None) if value is None else value

        if (setting("num_beams") or 1) > 1:
            raise Unsupported(NO_BEAMS)
        if any(kwargs.get(name) is not None for name in _CACHES):
            return generate(
                model, *args, **kwargs
            )  # the caller's: ours from new_cache, or one that the model attends to
        for name in ("cache_implementation", "prompt_lookup_num_tokens"):
            if setting(name) is not None:
                twilight.leave(f"generate was asked for {name}={setting(name)}, which brings a cache of its own")
                return generate(model, *args, **kwargs)
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
        prompt = inputs.shape[1] if inputs is not None else 1
        new = setting("max_new_tokens")
        length = prompt + new if new is not None else max(setting("max_length") or 0, prompt + 20)
        cache = twilight.new_cache(length)
        name = next(n for n in _CACHES if n in inspect.signature(model.forward).parameters)
        output = None
        try:
            output = generate(model, *args, **kwargs, **{name: cache})
        finally:
            if isinstance(output, torch.Tensor):  # else the caller may go on with the cache
                cache.release()
        return output

    return generating


_CACHES = ("cache", "past_key_values")  # the name that the model's forward has for its cache, newest first
