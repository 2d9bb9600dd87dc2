"""A pytest plugin (``-p resume``): a run continues where the last one stopped.

Outcomes are written to the journal. A test that was begun twice without an outcome, because it ended the process, is
given up.
"""

import time

import pytest
from journal import Journal


def pytest_addoption(parser):
    group = parser.getgroup("resume")
    group.addoption("--journal", help="file of the journal")
    group.addoption("--journal-version", help="version of the code")
    group.addoption("--journal-stage", help="stage that the tests belong to")
    group.addoption("--until", type=float, help="time (seconds since 1970) after which no test is started")


def pytest_configure(config):
    if config.getoption("journal"):
        config.pluginmanager.register(Resume(config), "resuming")


class Resume:
    def __init__(self, config):
        self.config, self.stage = config, config.getoption("journal_stage")
        self.journal = Journal(config.getoption("journal"), config.getoption("journal_version"))
        self.worker = hasattr(config, "workerinput")
        # All processes of xdist must leave out the same tests, whenever they start.
        self.done = set(config.workerinput["done"] if self.worker else self.journal.outcomes(self.stage))
        self.outcomes = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["done"] = sorted(self.done)

    def pytest_collection_modifyitems(self, config, items):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.done])
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_runtest_logstart(self, nodeid):
        if not self.worker:
            self.journal.add(self.stage, unit=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report):
        if self.worker:
            return
        if report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            text = (crash.message if crash else report.longreprtext).split("\n")[0][:200] if report.failed else None
            self.outcomes[report.nodeid] = report.outcome, text
        if report.when not in ("setup", "call"):  # xdist reports a crash of its process as another phase
            outcome, text = self.outcomes.pop(report.nodeid, ("passed", None))
            self.journal.add(self.stage, unit=report.nodeid, outcome=outcome, text=text)
            if time.time() > self.config.getoption("until"):
                session = self.config.pluginmanager.getplugin("dsession") or self.session
                session.shouldstop = "time is up"

    def pytest_sessionstart(self, session):
        self.session = session
