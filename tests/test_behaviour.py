"""What prompts name of the games that they were written from."""

import pytest

from experiments.behaviour import of_prompts
from experiments.report_loops import Loop

FIRST = "You play games. Pick up what you see."


def names(prompt, *games):
    """Whether a last prompt names something of a single one of these games, each given by its
    observations, two games to a context.
    """
    episodes = [
        {
            "game": {"env": "minihack", "family": "wear", "key": str(key)},
            "turns": [{"observation": observation} for observation in observations],
            "outcome": "success",
        }
        for key, observations in enumerate(games)
    ]
    loop = Loop(
        arm="trained",
        family="wear",
        seed=0,
        run=0,
        prompts=[{"system_prompt": FIRST}, {"system_prompt": prompt}],
        contexts={n: {"trajectories": episodes[2 * n : 2 * n + 2]} for n in range(len(games))},
    )
    return of_prompts([loop])["names"] == 1.0


ROBES = (["You see a robe 2 south."], ["You see a robe 1 north 1 east and a wand 2 west."])


@pytest.mark.parametrize(
    ("prompt", "games", "found"),
    [
        # of all games, which is what the family is about, or of one
        ("Wear the robe.", ROBES, False),
        ("Wave the Wand.", ROBES, True),
        ("Wave it. Wands are good.", ROBES, False),
        # one game tells of no other one
        ("Wave the wand.", ROBES[1:], False),
        # the same thing in another meta-turn
        ("Wave the wand.", (*ROBES, ["wand 1 north ."]), False),
        # where something is, is no thing; nor is what was there at first
        ("Go south, then east.", ROBES, False),
        ("Look for games.", (["You see games 2 south."], ["Nothing."]), False),
        # the other styles of MiniHack's text
        ("Eat the apple.", (["see : apple 2 north 1 east , stairs 3 west ."], ["wall"]), True),
        ("Take the stairs.", (["A staircase down 2 south. stairs 1 east"], ["wall"]), True),
        ("Use staircases.", (["A staircase down 2 south."], ["wall"]), False),
        ("Take the staircase.", (["You see a staircase down 2 south."], ["wall"]), True),
        ("Eat the ration.", (["You see:\n- food ration (2 north, 1 east)"], ["wall"]), True),
        # names of ALFWorld, wherever they stand
        ("Open drawer 3 first.", (["On the drawer 3, you see a pen 1."], ["Nothing."]), True),
        ("Open drawer 2 first.", (["On the drawer 3, you see a pen 1."], ["Nothing."]), False),
        ("Open Drawer 3.", (["drawer 3"], ["drawer 3"]), True),
    ],
)
def test_things_of_a_single_game_are_names(prompt, games, found):
    assert names(prompt, *games) is found


def test_the_first_prompt_names_nothing():
    assert not names(FIRST, *ROBES)
