"""Words for keys, values and lists: an adjective and a noun joined by a hyphen, which no text has by chance."""

from __future__ import annotations

import random
from collections.abc import Iterator

_ADJECTIVES = (
    "able amber ancient autumn azure bitter blank bold brass brave brief bright broad broken calm careful cheap "
    "chilly civil clean clever cloudy coarse copper crimson crisp curious damp dark deep dense distant dry dusty eager "
    "early earnest elder empty faint fair famous fancy fast fierce firm flat fond frail free fresh frosty gentle giant "
    "glad golden grand grave green grim hasty heavy hidden hollow honest humble hungry icy idle inner iron jolly keen "
    "kind late lazy lean light little lively lonely loud loyal lucky marble merry mild misty modest mossy narrow neat "
    "noble nimble odd old olive open pale patient plain polite proud prudent quick quiet rapid rare restless ripe "
    "robust rough round royal rustic sandy scarlet secret serene shallow sharp shy silent silver simple sleepy slender "
    "slow smooth snowy sober soft solemn solid spare steady stern still stout strange sturdy subtle sudden sunny "
    "swift tall tame tender thin tidy timid tiny tough upper urban vague vast velvet violet vivid warm weary wild wise"
)
_NOUNS = (
    "acorn anchor apron arrow attic badge bakery ballad banner barn basin basket beacon bell bench bishop blanket "
    "bonnet bottle branch bridge brook brush bucket button cabin cable candle canyon carpet castle cedar cellar chapel "
    "chart cherry chimney circle cliff clock cloud coach coast cobble comet compass cottage cradle crane creek crown "
    "cupboard curtain dagger desert dragon drawer drum eagle easel ember engine falcon feather fence ferry fiddle "
    "field flute forest fossil fountain galley garden garnet glacier glove goblet granite grove guitar hammer harbor "
    "harvest hedge helmet heron hinge island ivory jacket jasmine jewel journey kettle kitchen ladder lagoon lantern "
    "lemon letter library lizard locket maple market meadow mirror mitten monument mountain needle nickel nutmeg "
    "oasis orchard otter oyster paddle palace parade parcel pasture pebble pencil pepper pigeon pillow planet plum "
    "pocket portrait prairie pulley quarry quill rabbit raft rainbow raven reef ribbon river rocket rudder saddle "
    "satchel school shadow shelf shovel signal spade spindle spring stable statue summit table tailor temple thicket "
    "thimble timber tower trumpet tunnel turnip turtle valley vessel village violin wagon walnut whistle willow window"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def compound(rng: random.Random) -> str:
    """One adjective-noun word."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def compounds(rng: random.Random) -> Iterator[str]:
    """All adjective-noun words in random order."""
    total = len(ADJECTIVES) * len(NOUNS)
    for number in rng.sample(range(total), total):
        adjective, noun = divmod(number, len(NOUNS))
        yield f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"
