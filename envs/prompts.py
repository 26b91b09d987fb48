"""The first system prompts of actors: what the games are about and the form of a reply, no hint at
how to win. The one home of each; environments offer theirs by the style of their text.
"""

from collections.abc import Mapping
from types import MappingProxyType

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
        "compact": "you do a household task . think , then act .",
    }
)
