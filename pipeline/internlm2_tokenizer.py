"""InternLM2's sentencepiece model as a fast tokenizer that needs no code of its folder."""

import json
from pathlib import Path
from typing import Any

from cluster.errors import BadInputError

_CONTROL, _USER_DEFINED = 3, 4  # types of a piece in sentencepiece_model.proto
_BPE = 2
_PROBES = (
    "Tom has 3 pens and 12,345.67 more.\n\nHow many?",
    "  two spaces,\ta tab, \\boxed{8} and x_1 == 2 ** 10",
    "学而时习之，不亦说乎？ ¿Qué tal? 🐉",
)


def convert_tokenizer(source: Path) -> Any:
    """The tokenizer of an InternLM2 folder: tokenizer.model with tokenizer_config.json's tokens.

    Ids, special flags, BOS, EOS and the chat template stay. Raises BadInputError where the result
    would cut texts otherwise than sentencepiece does.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    given = json.loads((source / "tokenizer_config.json").read_text())
    added = {
        int(token_id): AddedToken(**token)
        for token_id, token in given.get("added_tokens_decoder", {}).items()
    }
    backend = _fast_backend(_read_proto(source / "tokenizer.model"), added)
    _check_ids(backend, added, source)
    _check_same(backend, source / "tokenizer.model")
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=given.get("add_bos_token", True),
        add_eos_token=given.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **{name: given[name] for name in names if given.get(name)},
    )
    tokenizer.chat_template = given.get("chat_template")
    return tokenizer


def _read_proto(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto: Any = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise BadInputError(f"{file} is no sentencepiece model: {error}") from None
    if proto.trainer_spec.model_type != _BPE:
        raise BadInputError(f"{file} is no BPE model, expected InternLM2's, which is one")
    return proto


def _fast_backend(proto: Any, added: dict[int, Any]) -> Any:
    """A BPE that merges in the order of sentencepiece's scores, with the added tokens in place.

    InternLM2's added tokens take the ids of pieces that were kept free for them.
    """
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import SpmConverter, generate_merges

    kept = {i: p for i, p in enumerate(proto.pieces) if p.type in (_CONTROL, _USER_DEFINED)}
    tokens = {
        i: AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
        for i, piece in kept.items()
    } | added
    pieces = [str(added.get(i, p.piece)) for i, p in enumerate(proto.pieces)]
    scores = {piece: p.score for piece, p in zip(pieces, proto.pieces, strict=True)}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    skip = {str(token) for token in tokens.values()}
    merges = generate_merges(vocabulary, scores, skip)
    backend: Any = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, merges)
    _treat_spaces(backend, proto.normalizer_spec)
    backend.add_tokens([token for _, token in sorted(tokens.items(), key=lambda item: item[0])])
    return backend


def _treat_spaces(backend: Any, spec: Any) -> None:
    """What sentencepiece does to spaces before it cuts, and undoes when it decodes."""
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z| +(?= )"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
        last = decoders.Strip(content=" ", left=1)
        backend.decoder = decoders.Sequence([backend.decoder, last])
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _check_ids(backend: Any, added: dict[int, Any], source: Path) -> None:
    for token_id, token in added.items():
        if backend.token_to_id(str(token)) != token_id:
            raise BadInputError(
                f"{source}: the added token {token} got id {backend.token_to_id(str(token))}, "
                f"expected {token_id} as in added_tokens_decoder"
            )


def _check_same(backend: Any, model_file: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(model_file))
    for text in _PROBES:
        expected = original.encode(text)
        found = backend.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise BadInputError(
                f"{model_file} has rules that a fast tokenizer cannot follow: it makes {expected} "
                f"of {text!r}, the fast one {found}"
            )
