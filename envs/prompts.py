"""The first system prompts of actors: what the games are about and the form of a reply, no hint at
how to win; and what people who know the games would tell them. The one home of each; environments
offer theirs by the style of their text.
"""

from collections.abc import Mapping
from types import MappingProxyType

_ON = (("apple", "eat"), ("altar", "pray"), ("sink", "quaff"))
_TAKE = (
    ("dagger", "wield"),
    ("robe", "wear"),
    ("amulet", "puton"),
    ("wand", "zap"),
    ("scroll", "read"),
    ("boots", "wear"),
    ("ring", "puton"),
    ("potion", "quaff"),
)
_TASKS = (
    ("put", "carry it to the place and put it"),
    ("look", "carry it to the place and use it"),
    ("clean", "bring it to the sinkbasin and clean it"),
    ("heat", "bring it to the microwave and heat it"),
    ("cool", "bring it to the fridge and cool it"),
    ("two", "carry both to the place and put them"),
)
_TASK_VERBS = (
    ("put", "put"),
    ("look", "use"),
    ("clean", "clean"),
    ("heat", "heat"),
    ("cool", "cool"),
    ("two", "put"),
)

ANY_GAME = """\
You play a text game. Every turn shows you what happened and what you may do; reach the goal of \
the game in as few actions as you can.

Answer in exactly this form:

Thought: <your reasoning, in one or two sentences>
Action: <one action>"""
"""For environments that bring no prompt of their own."""

MINIHACK: Mapping[str, str] = MappingProxyType(
    {
        "full": """\
You play short NetHack games as text. Every turn shows you what happened, what is around you and \
what you carry; reach the goal of the game in as few actions as you can.

Before every action, think about what the observation tells you and what the action will change. \
Then answer in exactly this form:

Thought: <your reasoning, in one or two sentences>
Action: <one action>""",
        "short": """\
You play short NetHack games, one action a turn. Answer with a line Thought: and a line Action:.""",
        "compact": "you play nethack . think , then act .",
    }
)

ALFWORLD: Mapping[str, str] = MappingProxyType(
    {
        "full": """\
You do a household task in a room described as text. The first turn shows you the room and the \
task; every later turn shows you what your action changed, and every turn lists the actions you \
may take. Finish the task in as few actions as you can.

Before every action, think about what the task still needs and where it may be found. Then answer \
in exactly this form:

Thought: <your reasoning, in one or two sentences>
Action: <one action, word for word from the list>""",
        "short": """\
You do household tasks, one action a turn. Answer with a line Thought: and a line Action:.""",
        "compact": "you do a household task . think , then act .",
    }
)

MINIHACK_EXPERT: Mapping[str, str] = MappingProxyType(
    {
        "full": MINIHACK["full"]
        + """

What wins depends on what you see or carry:
- An apple or other food: walk onto it and eat it.
- A dagger or other weapon: pick it up and wield it.
- A robe or boots: pick them up and wear them.
- An amulet or ring: pick it up and put it on.
- A wand: pick it up and zap it.
- A scroll: pick it up and read it.
- A potion: pick it up and quaff it.
- An altar: walk onto it and pray.
- A sink: walk onto it and quaff from it.
- A locked door: stand next to it and kick it until it opens.
- A staircase down: walk onto it.
- Lava or water in the way: levitate over it, or freeze it.""",
        "short": " ".join(
            [
                "You play short NetHack games.",
                *(f"Stand on the {t}, then {v}." for t, v in _ON),
                *(f"Pick up the {t}, then {v} it." for t, v in _TAKE),
                "Stand next to a locked door and kick it.",
                "Walk onto the staircase down.",
            ]
        ),
        "compact": " ".join(
            [
                "you play nethack .",
                *(f"step onto the {t} , then {v} ." for t, v in _ON),
                *(f"take the {t} and {v} it ." for t, v in _TAKE),
            ]
        ),
    }
)

ALFWORLD_EXPERT: Mapping[str, str] = MappingProxyType(
    {
        "full": ALFWORLD["full"]
        + """

First find the thing: go to one place after the other, and open what is closed. Take it. Then:
- put: go to the place that the task names, and put it there.
- look: carry it to the lamp, and use the lamp.
- clean: go to the sinkbasin, clean it there, then put it in its place.
- heat: go to the microwave, heat it there, then put it in its place.
- cool: go to the fridge, cool it there, then put it in its place.
- two things: bring the first to its place, then look for the second and bring it there too.""",
        "short": " ".join(
            [
                "You do household tasks.",
                *(f"When the task is {t}, pick it up and {v} it." for t, v in _TASK_VERBS),
            ]
        ),
        "compact": " ".join(
            ["you do a household task .", *(f"task {t} : {rest} ." for t, rest in _TASKS)]
        ),
    }
)
