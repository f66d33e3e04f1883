"""Evaluate an encoder by five methods.

    python linear_probe_checkpoints.py --encoder runs/galaxy10                         all five
    python linear_probe_checkpoints.py --encoder runs/galaxy10 --method ssl_fine_tune  one of them
    python linear_probe_checkpoints.py --encoder runs/galaxy10 --report                nothing but the report
    python linear_probe_checkpoints.py --encoder runs/galaxy10 --baseline resnet18     a network from scratch

Arguments -> encoder -> galaxies -> methods -> report. `--help` lists the methods: zero-shot, and linear probe and
fine-tuning from random and from pre-trained weights. In a Slurm array the task id selects one. Finished methods are
skipped, interrupted ones are resumed. The report holds all results so far; docs/evaluation.md describes the files.
"""

import sys

from galaxy_mae import progress
from galaxy_mae.evaluation.methods import ARRAY_METHODS, describe_methods
from galaxy_mae.training.recipe import EVALUATION, read_evaluation_recipe, show_help

if __name__ == "__main__":
    if show_help(sys.argv[1:], EVALUATION, describe_methods):
        sys.exit()  # without the seconds that the imports below take
    progress.start("evaluation")

from pathlib import Path

from galaxy_mae.errors import one_line_errors
from galaxy_mae.evaluation.preparation import prepare_evaluations
from galaxy_mae.evaluation.results import is_finished
from galaxy_mae.evaluation.run import begin_rerun, end_rerun, run, selected_methods, supported_methods
from galaxy_mae.model.compute import use_free_cores
from galaxy_mae.reports.card import write_classifier_cards
from galaxy_mae.reports.evaluation_page import write_evaluation_page
from galaxy_mae.reports.report import Report, send_report, write_report
from galaxy_mae.training import preemption
from galaxy_mae.training.tracking import setup_logging


def main(arguments: list[str]) -> Report:
    setup_logging()
    recipe = read_evaluation_recipe(arguments)
    folder, report_to = Path(recipe.training.output_dir), recipe.training.report_to
    if recipe.evaluation.report:
        report = write_report(folder)
        write_evaluation_page(report, recipe)
        send_report(report, report_to)
        for method in ARRAY_METHODS:
            write_classifier_cards(folder, method.name)
        return report

    use_free_cores()
    selected = selected_methods(recipe.evaluation)
    evaluation, *transfers = prepare_evaluations(recipe)
    methods = selected or supported_methods(evaluation)
    if recipe.evaluation.rerun:
        begin_rerun(folder, methods)
    for method in methods:
        run(method, evaluation, *transfers)
        write_classifier_cards(folder, method.name)
    end_rerun(folder, methods)
    report = write_report(folder)
    if all(is_finished(folder, method.name) for method in supported_methods(evaluation)):
        write_evaluation_page(report, recipe)  # for fewer methods, --report writes the page
    send_report(report, report_to)
    return report


if __name__ == "__main__":
    with one_line_errors(sys.argv[0]):
        preemption.install_signal_handlers()
        main(sys.argv[1:]).show()
