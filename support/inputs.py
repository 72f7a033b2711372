"""What a training is made from, told by its contents: the base's parts and every pair, before the first step."""

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from support.batches import EncodedPairs
from support.detect import warn_if_inverted
from support.devices import describe, usable_cpus
from support.errors import UserError, warn_if_cut
from support.files import locked, read_json, save_json
from support.listing import refuse_broken
from support.run import Run


def open_inputs(run: Run, sd, controlnet, pairs, held_out) -> EncodedPairs:
    """Look at the base, the ControlNet to start from if there is one, and all pairs; refuse others than at first."""
    networks = {"base's UNet": sd.unet, "base's VAE": sd.vae, "base's text encoder": sd.text_encoder}
    if controlnet is not None:
        networks["ControlNet that it starts from"] = controlnet
    checksums = {
        name: digest(*(tensor.cpu().contiguous().numpy() for tensor in network.state_dict().values()))
        for name, network in networks.items()
    } | {"base's tokenizer": digest(json.dumps(sd.tokenizer.tokens).encode())}
    contents, held_out_contents = look_at(pairs, held_out, record=run.folder / "cache" / "pictures.json")
    if run.writes:
        inputs = [(f"the {name}", checksum) for name, checksum in checksums.items()]
        for some, found in ((pairs, contents), (held_out, held_out_contents)):
            for i, parts in enumerate(zip(some.prompts, found)):
                inputs.append((some.name(i), digest(json.dumps(parts).encode())[:16]))
        remember(run.folder / "inputs.json", inputs, describe(run.device), run.checkpoint is not None)
        warn_if_cut(sd.tokenizer, {pairs.name(i): prompt for i, prompt in enumerate(pairs.prompts)})
        warn_if_inverted(pairs.name(0), pairs.hint(0))
    precision = "bf16" if run.args.mixed_precision == "bf16" else "float32"  # in fp16 the VAE can overflow
    vae = checksums["base's VAE"]
    encoder = f"{vae} {pairs.resolution} {precision}"
    return EncodedPairs(pairs, contents, run.folder / "cache" / "moments", encoder, sd.vae.config.latent_channels)


def digest(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def look_at(*sets, record: Path) -> list[list[str]]:
    """The contents of each set's pairs. Raises UserError that shows the broken ones.

    Their files are opened, but for those that `record` knows from another time, by path, size and date. Of several
    processes one looks, the others then find the record.
    """
    with locked(record.with_suffix(".lock")):
        known = {}
        with contextlib.suppress(UserError):  # none yet, or a damaged one
            known = read_json(record)
        stamps = [[stamp(*pairs.files(i)) for i in range(len(pairs))] for pairs in sets]
        named = {stamp: (pairs, i) for pairs, some in zip(sets, stamps) for i, stamp in enumerate(some) if stamp}
        new = {stamp: pair for stamp, pair in named.items() if stamp not in known}
        with ThreadPoolExecutor(usable_cpus()) as pool:
            found = list(tqdm(pool.map(look, new.values()), "looking at the pairs", len(new), disable=not new))
        known |= {stamp: content for stamp, (content, _) in zip(new, found) if content}
        if known:
            save_json(known, record)
    refuse_broken([error for _, error in found if error], len(named), "the pairs")
    return [[known.get(stamp) or pairs.content(i) for i, stamp in enumerate(some)] for pairs, some in zip(sets, stamps)]


def stamp(*files: Path) -> str:
    """What tells without opening them that files are still the same; "" of no files."""
    return " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def look(pair: tuple) -> tuple[str, str]:
    """The content of a pair, or else what is wrong with it."""
    pairs, index = pair
    try:
        return pairs.content(index), ""
    except UserError as error:
        return "", str(error)


def remember(record: Path, inputs: list[tuple[str, str]], device: str, resumed: bool) -> None:
    """Write down the checksums of all that a run is made from; going on with anything else is refused by its name."""
    checksums = [checksum for _, checksum in inputs]
    if resumed and record.exists():
        known = read_json(record, "delete it, and these are taken for the same")
        if known["device"] != device:
            tqdm.write(f"warning: so far it was trained on {known['device']}; on {device} the last bits can differ")
        if known["inputs"] != checksums:
            changed = (name for (name, checksum), before in zip(inputs, known["inputs"]) if checksum != before)
            raise UserError(f"{next(changed, 'the number of pairs')} is not what {record.parent} was trained with: "
                            "restore it, or start another --output-dir")  # fmt: skip
    save_json({"device": device, "inputs": checksums}, record)
