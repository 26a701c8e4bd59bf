"""Teach an agent to cross a windy grid by REINFORCE, in plain NumPy: a cross-entropy whose weights may be negative.

Usage: python examples/reinforce_gridworld.py [--quick] [--seed S] [--out DIR]
Needs: pip install ".[demo]" (the world is computed; nothing is downloaded)

The targets are the moves that were made, the weight of each is its advantage: what was earned after it, less what was
earned on average from that place on. A good move is pulled up, a bad one pushed down. Such weights add up to 0, so
they are no denominator; the loss is divided by the number of episodes. Value iteration, which is told how the world
works, says what the best policy earns. A run that does not come close to it ends with exit code 1.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap
from report import draw_level, in_words, new_picture, read_options, save_picture
from tqdm import tqdm

import fastce

MAP = (  # ~ water, # wall, G goal
    "....#....",
    "..~.#.~~.",
    "......~..",
    "..~.#...~",
    "..~.#.~.G",
)
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # rows down, columns right
WIND = 0.1  # how often the wind makes the move
LONGEST_WALK = 100
EPISODES = 128  # per update
LEARNING_RATE = 0.1
UPDATES, QUICK_UPDATES = 400, 60
WANTED, QUICK_WANTED = 1.15, 2.0  # the cost of a walk, over that of the best policy


class World(NamedTuple):
    """The P cells are numbered: where the 4 moves lead (P, 4), what arriving pays (P,), where walks end and start."""

    cells: np.ndarray
    ahead: np.ndarray
    rewards: np.ndarray
    goal: int
    starts: np.ndarray


def build_world():
    """Read the map. Walls and the edge leave the agent where it is; a move costs 1, one into water 10."""
    cells = np.array([list(line) for line in MAP])
    places = np.arange(cells.size).reshape(cells.shape)
    rows, columns = np.indices(cells.shape)
    ahead = []
    for down, right in MOVES:
        nearby = places[np.clip(rows + down, 0, rows.max()), np.clip(columns + right, 0, columns.max())]
        ahead.append(np.where(cells.flat[nearby] == "#", places, nearby).ravel())
    rewards = np.where(cells == "~", -10.0, -1.0)
    starts = np.flatnonzero((cells != "G") & (cells != "#"))
    return World(cells, np.stack(ahead, axis=1), rewards.ravel(), int(places[cells == "G"][0]), starts)


def expected_return(world, summary):
    """Return what a walk earns on average; `summary` makes values of places (P,) from values of moves (P, 4)."""
    values = np.zeros(world.cells.size)
    for _ in range(1000):
        after = (world.rewards + values)[world.ahead]
        after = (1 - WIND) * after + WIND * after.mean(axis=1, keepdims=True)
        values = summary(after)
        values[world.goal] = 0
    return values[world.starts].mean()


def walk(world, policy, generator):
    """Let EPISODES agents walk; return for every move its place, its number and all that was earned from then on.

    The last result is what an episode earned on average.
    """
    place = generator.choice(world.starts, EPISODES)
    places, moves, rewards = [], [], []
    while len(places) < LONGEST_WALK and np.any(place != world.goal):
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        move = np.argmax(policy[place] + generator.gumbel(size=(EPISODES, 4)), axis=1)
        made = np.where(generator.random(EPISODES) < WIND, generator.integers(4, size=EPISODES), move)
        arrived = world.ahead[place, made]
        places.append(place)
        moves.append(move)
        rewards.append(np.where(place == world.goal, 0.0, world.rewards[arrived]))
        place = np.where(place == world.goal, place, arrived)
    places, moves = np.array(places), np.array(moves)
    earned = np.cumsum(rewards[::-1], axis=0)[::-1]
    on_the_way = places != world.goal
    return places[on_the_way], moves[on_the_way], earned[on_the_way], earned[0].mean()


def advantages(places, earned):
    """Return what was earned after each move, less the average over all moves from the same place."""
    averages = np.bincount(places, weights=earned) / np.maximum(np.bincount(places), 1)
    return earned - averages[places]


def learn(world, updates, generator):
    """Return the policy, logits (P, 4), and for every update what a walk earned and the share of negative weights."""
    policy = np.zeros((world.cells.size, 4))
    history = []
    for _ in tqdm(range(updates), desc="learning", unit="update", leave=False):
        places, moves, earned, average = walk(world, policy, generator)
        weights = advantages(places, earned)
        _, grad = fastce.cross_entropy_with_grad(policy[places], moves, sample_weight=weights, denominator=EPISODES)
        # A place gathers the gradients of all visits to it.
        grad_policy = np.zeros_like(policy)
        np.add.at(grad_policy, places, grad)
        policy -= LEARNING_RATE * grad_policy
        history.append((average, np.mean(weights < 0)))
    return policy, np.array(history)


def draw(world, policy, earned, best, folder):
    """Save the picture of the map, with an arrow where the policy tends to, and of what a walk costs."""
    figure, (map_panel, cost_panel) = new_picture("REINFORCE: the way to the goal, round the water", (7, 5))
    map_panel.set_title("the policy: a long arrow is a sure move, a short one undecided", loc="left", fontsize=11)
    map_panel.set_axis_off()
    colours = ListedColormap(["0.95", "#a9d0f0", "0.45", "#b5dfae"])
    map_panel.pcolormesh(np.char.find(".~#G", world.cells), cmap=colours, edgecolors="w", linewidth=2)
    map_panel.invert_yaxis()
    map_panel.set_aspect("equal")
    row, column = np.unravel_index(world.starts, world.cells.shape)
    down, right = 0.8 * (fastce.softmax(policy[world.starts]) @ MOVES).T
    exactly = {"angles": "xy", "scale_units": "xy", "scale": 1, "pivot": "mid", "width": 0.006}
    map_panel.quiver(column + 0.5, row + 0.5, right, down, color="black", **exactly)
    row, column = np.unravel_index(world.goal, world.cells.shape)
    map_panel.text(column + 0.5, row + 0.5, "goal", ha="center", va="center")

    cost_panel.set_title("cost of a walk (log scale)", loc="left", fontsize=11)
    cost_panel.set_yscale("log")
    cost_panel.set_yticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
    cost_panel.set_ylim(-0.8 * best, -1.2 * earned.min())
    cost_panel.plot(-earned, color="tab:blue", linewidth=1.2)
    cost_panel.set_xlabel("update")
    draw_level(cost_panel, -best, f"best possible: {-best:.1f}", above=False)
    save_picture(figure, folder, "reinforce_gridworld.png")


def main():
    options = read_options(__doc__.partition("\n")[0], f"{QUICK_UPDATES} updates, of which less is expected")
    world, generator = build_world(), np.random.default_rng(options.seed)
    policy, history = learn(world, QUICK_UPDATES if options.quick else UPDATES, generator)

    probabilities = fastce.softmax(policy)
    best = expected_return(world, lambda values: values.max(axis=1))
    learnt = expected_return(world, lambda values: (probabilities * values).sum(axis=1))
    visited, *_ = walk(world, policy, generator)
    entropy = fastce.cross_entropy(policy[visited], probabilities[visited])
    print(f"{history[0, 1]:.0%} of the first moves and {history[-1, 1]:.0%} of the last had a negative weight.")
    print(f"A move at first: log 4 = {in_words(math.log(4))}.")
    print(f"A move now:      {in_words(entropy)}.")
    print(f"A walk cost {-history[0, 0]:.1f} at first, costs {-learnt:.2f} now, and {-best:.2f} with the best policy.")
    draw(world, policy, history[:, 0], best, options.out)
    if learnt < best * (wanted := QUICK_WANTED if options.quick else WANTED):
        sys.exit(f"That is more than {wanted} times the cost of the best policy.")


if __name__ == "__main__":
    main()
