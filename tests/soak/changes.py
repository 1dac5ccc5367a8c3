"""The connection that changes the pools while claims are under way: sizes, depths, states, tenants' limits, and where
payloads and outcomes are kept."""

from __future__ import annotations

import random
import threading

import psycopg
from psycopg.types.json import Jsonb

from tests.soak.plan import Config, Plan


class Changes(threading.Thread):
    """Changes one pool after another until told to stop, then puts everything back as it was."""

    def __init__(self, dsn: str, plan: Plan) -> None:
        super().__init__(daemon=True)
        self.dsn, self.plan = dsn, plan
        self.dice = random.Random(plan.seed)
        self.made = 0
        self.kept: dict[str, Config] = {}  # where each pool keeps things now
        self.error: BaseException | None = None
        self.halt = threading.Event()

    def run(self) -> None:
        try:
            with psycopg.connect(self.dsn, autocommit=True) as self.connection:
                while not self.halt.wait(self.dice.uniform(0.005, 0.1)):
                    pool = self.dice.choice(list(self.plan.pools()))
                    if self.dice.random() < 0.3:
                        self.close_for_a_while(pool)
                    else:
                        self.put(pool, self.changed(pool))
                for pool, config in self.plan.pools().items():
                    self.put(pool, config)
                    self.state(pool, "active")
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self.halt.set()
        self.join()
        if self.error:
            raise self.error

    def put(self, pool: str, config: Config) -> None:
        self.connection.execute("select pgpark.park_put_pool(%s, %s)", [pool, Jsonb(config)])
        self.made += 1

    def state(self, pool: str, state: str) -> None:
        self.connection.execute("select pgpark.park_set_pool_state(%s, %s)", [pool, state])
        self.made += 1

    def close_for_a_while(self, pool: str) -> None:
        for _ in range(self.dice.randint(1, 2)):
            self.state(pool, self.dice.choice(["paused", "draining", "disabled"]))
            self.halt.wait(self.dice.uniform(0, 0.1))
        self.state(pool, "active")

    def changed(self, pool: str) -> Config:
        """The pool's config, with some settings at random."""
        dice, config = self.dice, dict(self.plan.pools()[pool])
        tiny = dice.random() < 0.04  # then the larger half of the tasks can never fit
        config["max_units"] = 8 if tiny else int(config["max_units"] * dice.uniform(0.2, 1.3))
        config["max_bypass"] = dice.choice([config.get("max_bypass", 0), dice.randint(0, 10)])
        if depth := config.get("max_queue_depth"):
            config["max_queue_depth"] = max(1, int(depth * dice.uniform(0.1, 1.3)))
            config["overflow"] = dice.choice(["reject", "drop_lowest"])
        if "tenants" in config:
            config["tenants"] = {
                tenant: {"weight": dice.choice([0.5, 1, 2, 5])}
                | ({"max_units": dice.randint(4, self.plan.units // 4)} if dice.random() < 0.5 else {})
                for tenant in ["a", "b", "c", ""]
            }
        if dice.random() < 0.1:
            kind = dice.choice(["in_memory", "postgres_custom", "postgres_pgmq", "yaque"])
            config["queue"] = {"type": kind}
            config["mailbox"] = {"storage": dice.choice([{"type": "in_memory"}, {"table": "outcomes"}, {}])}
        elif self.kept.get(pool):  # else each change would move it back
            config |= self.kept[pool]
        self.kept[pool] = {key: config[key] for key in ("queue", "mailbox") if key in config}
        return config
