"""A scripted player of ALFWorld: plays all six families from what an agent sees, the official text
and the admissible commands.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from envs.alfworld.compact import Notes, kind_of

# Where to look first for a thing: kinds of places by the share of them that hold it in the 3,553
# official training games, halved for those that have to be opened. Facts of the benchmark, as an
# experienced player would know them; nothing here comes from the game that is played.
_LIKELY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        thing: tuple(places.split())
        for thing, places in {
            "alarmclock": "desk sidetable dresser diningtable shelf",
            "apple": "sidetable diningtable garbagecan countertop sinkbasin fridge microwave",
            "book": (
                "bed desk coffeetable dresser diningtable armchair sidetable sofa cabinet drawer"
                " shelf"
            ),
            "bowl": (
                "desk tvstand diningtable dresser countertop shelf sidetable fridge microwave"
                " sinkbasin cabinet"
            ),
            "box": "sofa coffeetable diningtable tvstand dresser sidetable cabinet armchair",
            "bread": "diningtable countertop garbagecan fridge microwave",
            "butterknife": "countertop diningtable sidetable sinkbasin drawer",
            "candle": "countertop toilet sidetable dresser shelf cabinet drawer",
            "cd": (
                "diningtable desk dresser sidetable armchair garbagecan cabinet drawer safe shelf"
            ),
            "cellphone": (
                "coffeetable desk bed diningtable dresser armchair sofa sidetable shelf safe"
                " cabinet drawer"
            ),
            "cloth": "bathtubbasin countertop dresser cart shelf cabinet toilet sinkbasin drawer",
            "creditcard": (
                "dresser tvstand desk diningtable sidetable sofa coffeetable countertop armchair"
                " shelf drawer"
            ),
            "cup": "diningtable countertop sinkbasin sidetable fridge microwave shelf cabinet",
            "desklamp": "dresser sidetable desk coffeetable shelf",
            "dishsponge": (
                "diningtable bathtubbasin countertop toilet cart garbagecan shelf sinkbasin drawer"
                " cabinet"
            ),
            "egg": "diningtable sidetable sinkbasin countertop garbagecan fridge microwave",
            "fork": "diningtable sidetable countertop drawer",
            "glassbottle": "diningtable countertop sinkbasin garbagecan shelf fridge cabinet",
            "handtowel": "handtowelholder countertop",
            "kettle": "diningtable stoveburner countertop sinkbasin cabinet",
            "keychain": (
                "coffeetable diningtable dresser sidetable tvstand desk armchair ottoman safe shelf"
                " sofa drawer cabinet"
            ),
            "knife": "diningtable countertop sidetable drawer",
            "ladle": "diningtable countertop cabinet drawer",
            "laptop": "bed countertop sofa diningtable coffeetable desk dresser sidetable armchair",
            "lettuce": "diningtable sidetable countertop fridge garbagecan sinkbasin",
            "mug": (
                "desk coffeemachine diningtable dresser countertop sidetable sinkbasin fridge shelf"
                " microwave cabinet"
            ),
            "newspaper": (
                "diningtable dresser coffeetable sofa sidetable armchair shelf tvstand ottoman"
                " drawer"
            ),
            "pan": "stoveburner countertop diningtable fridge cabinet",
            "pen": (
                "diningtable coffeetable countertop desk dresser sidetable shelf garbagecan drawer"
            ),
            "pencil": "diningtable dresser desk sidetable shelf garbagecan drawer",
            "peppershaker": "countertop diningtable shelf cabinet drawer",
            "pillow": "bed sofa armchair",
            "plate": (
                "diningtable tvstand countertop dresser sidetable fridge coffeetable sinkbasin"
                " shelf cabinet microwave"
            ),
            "pot": "stoveburner diningtable countertop sinkbasin fridge shelf cabinet",
            "potato": "diningtable sidetable countertop sinkbasin garbagecan fridge microwave",
            "remotecontrol": (
                "diningtable coffeetable dresser tvstand sofa countertop sidetable armchair shelf"
                " drawer"
            ),
            "saltshaker": "countertop sidetable diningtable shelf cabinet drawer",
            "soapbar": (
                "sidetable countertop toilet bathtubbasin cart garbagecan shelf cabinet sinkbasin"
                " drawer"
            ),
            "soapbottle": "dresser countertop sidetable toilet shelf garbagecan cabinet",
            "spatula": "diningtable countertop sinkbasin drawer",
            "spoon": "diningtable countertop sidetable sinkbasin drawer",
            "spraybottle": "sidetable countertop toilet cart garbagecan shelf dresser cabinet",
            "statue": "desk diningtable sidetable coffeetable shelf dresser tvstand",
            "tissuebox": (
                "countertop diningtable desk coffeetable tvstand dresser toilet shelf sidetable"
                " cabinet garbagecan drawer"
            ),
            "toiletpaper": (
                "dresser countertop toilet sidetable shelf garbagecan toiletpaperhanger cart"
                " cabinet drawer"
            ),
            "tomato": "diningtable sidetable countertop garbagecan fridge sinkbasin",
            "vase": "dresser diningtable tvstand coffeetable desk shelf sidetable cabinet",
            "watch": "tvstand diningtable sidetable dresser coffeetable desk shelf drawer",
            "wateringcan": "coffeetable",
            "winebottle": "diningtable countertop garbagecan shelf fridge cabinet",
        }.items()
    }
)
# One bathroom has a sink that the text calls bathtubbasin.
_STATIONS = MappingProxyType(
    {"clean": ("sinkbasin", "bathtubbasin"), "heat": ("microwave",), "cool": ("fridge",)}
)


def make_expert() -> Callable[[str, Sequence[str]], str]:
    """A player for one episode: called each turn with the official text and the admissible
    commands, it returns the next command.

    The first text must be that of a reset (ValueError otherwise). The same texts give the same
    commands.
    """
    notes: Notes | None = None
    command = ""

    def act(text: str, commands: Sequence[str]) -> str:
        nonlocal notes, command
        if notes is None:
            notes = Notes(text, tuple(commands))
        else:
            notes.update(command, text, tuple(commands))
        command = next_command(notes)
        return command

    return act


def next_command(notes: Notes) -> str:
    """The next command of an expert who knows what the notes hold; `look` where everything was
    searched in vain.
    """
    task = notes.task
    if not notes.held:
        target = _destination(notes)
        # What lies where it belongs already stays there; a thing to be cleaned, heated or cooled is
        # fetched from anywhere.
        candidates = [
            (thing, place)
            for thing, place in notes.find(task.thing)
            if task.kind not in ("put", "two") or place != target
        ]
        if not candidates:
            return _search(notes, task.thing)
        thing, place = candidates[0]
        return _at(notes, place, f"take {thing} from {place}")
    if notes.lamp:
        lamps = notes.find(notes.lamp)
        return (
            _at(notes, lamps[0][1], f"use {lamps[0][0]}") if lamps else _search(notes, notes.lamp)
        )
    stations = _STATIONS.get(task.kind)
    if stations and notes.held not in notes.marks:
        places = [place for station in stations for place in _of_kind(notes, station)]
        return (
            _at(notes, places[0], f"{task.kind} {notes.held} with {places[0]}")
            if places
            else "look"
        )
    target = _destination(notes)
    return _at(notes, target, f"move {notes.held} to {target}") if target else "look"


def _of_kind(notes: Notes, kind: str) -> list[str]:
    return [place for place in notes.places if kind_of(place) == kind]


def _destination(notes: Notes) -> str:
    """The place to bring things to, or empty: two things must end in the same one, so one with such
    a thing is best.
    """
    places = _of_kind(notes, notes.task.place)
    held_there = {
        place: sum(kind_of(thing) == notes.task.thing for thing in notes.contents.get(place, ()))
        for place in places
    }
    return max(places, key=lambda place: (held_there[place], place in notes.contents), default="")


def _at(notes: Notes, place: str, command: str) -> str:
    """The command once it is admissible; before that, a step towards it: going to the place, or
    opening it.
    """
    if command in notes.actions:
        return command
    steps = (
        (f"go to {place}", f"open {place}", f"examine {place}")
        if notes.here != place
        else (f"open {place}",)
    )
    return next((step for step in steps if step in notes.actions), "look")


def _search(notes: Notes, thing: str) -> str:
    """A step towards looking into the place where the thing is likeliest, of those not looked into
    yet.
    """
    if notes.here in notes.closed:
        return f"open {notes.here}"
    likely = _LIKELY.get(thing, ())
    rank = {kind: index for index, kind in enumerate(likely)}
    left = sorted(notes.unseen(), key=lambda place: rank.get(kind_of(place), len(likely)))
    return _at(notes, left[0], f"examine {left[0]}") if left else "look"
