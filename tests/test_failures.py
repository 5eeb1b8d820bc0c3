"""The index of known failure cases: each row has a test that is named after its case."""

import ast
import functools
from pathlib import Path

import loops
import pytest

HERE = Path(__file__).parent

# Row -> the case, and where it is held: a loop of loops.py by its name, a test as file::name, or
# a sentence of docs/loops.md or docs/frameworks.md where it cannot run here.
ROWS = {
    "1": (
        "closures that clip",
        [
            "step(closure) that clips inside",
            "step(closure)",
            "test_integrations.py::test_lightning_gives_the_norms_before_clipping_and_learns_the_same",
        ],
    ),
    "2": (
        "clip, callbacks, step",
        [
            "clip_grad_norm_ by its full name",
            "test_integrations.py::test_the_trainer_callback_gives_every_norm_that_the_trainer_knows",
        ],
    ),
    "3": (
        "early-bound names",
        [
            "clip_grad_norm_ imported early",
            "clip function kept in an attribute",
            "clip_grads_with_norm_ imported early",
            "clip_grad_norm, the deprecated name",
            "test_interception.py::test_every_form_of_the_call_does_what_it_did",
            "test_interception.py::test_this_torch_builds_its_clip_functions_as_the_dispatcher_knows",
        ],
    ),
    "4": (
        "hand-written clipping",
        [
            'clip by own arithmetic, measure="backward"',
            "clip by own arithmetic, unseen",
            "GradScaler, unscale_, clip by own arithmetic, unseen",
            "test_recorder.py::test_an_engine_can_record_the_norm_it_knows",
        ],
    ),
    "5": (
        "manual optimization",
        [
            "clip_grad_norm_ imported early",
            "test_integrations.py::test_lightning_gives_the_norms_before_clipping_and_learns_the_same",
        ],
    ),
    "6": ("clip after step", ["clip after step()"]),
    "7": (
        "clip before backward",
        ["clip before backward()", "clip before backward(), zeroed in place"],
    ),
    "8": ("fused and GradScaler", ["GradScaler, fused optimizer, no unscale_"]),
    "9": (
        "GradScaler skips",
        [
            "GradScaler skips two steps",
            "GradScaler skips two steps, fused",
            "test_loops.py::test_skipped_steps_are_marked_and_stay_outside_the_statistics",
        ],
    ),
    "10": ("clip without unscale_", ["GradScaler, clip without unscale_"]),
    "11": (
        "Lightning, AMP, fused, gradient_clip_val",
        [
            "test_integrations.py::test_lightning_with_amp_and_a_fused_optimizer_refuses_to_clip_at_its_first_step",
            "test_integrations.py::test_what_lightning_refuses_with_amp_and_a_fused_optimizer_an_imposed_max_norm_does",
            "test_commands.py::test_crashes_quote_the_last_lines_and_stop_the_study",
            "docs: With AMP and a fused optimizer Lightning itself refuses",
        ],
    ),
    "12": (
        "clip after every micro-batch",
        [
            "clip after every micro-batch",
            "torch.compile of the clip call, after every micro-batch",
        ],
    ),
    "13": ("accumulation", ["accumulation, no clipping", "accumulation, clip at its end"]),
    "14": ("several closures a step", ["LBFGS: ten closures a step"]),
    "15": (
        "nested step hooks",
        [
            "subclass that calls super().step()",
            "optimizer around an optimizer (Lookahead)",
            "test_interception.py::test_only_the_outermost_step_counts",
        ],
    ),
    "16": ("clip inside step", ["clip inside the optimizer's step, one by one"]),
    "17": (
        "no torch optimizer",
        [
            "a class with step() that is no torch optimizer",
            "no optimizer object: hand-written update",
            "test_interception.py::test_an_optimizer_that_never_called_its_parents_init_is_seen",
            "test_launch.py::test_a_command_that_gives_no_norms_is_told_why",
        ],
    ),
    "17b": (
        "masters and shards",
        [
            "test_recorder.py::test_copies_whose_gradients_are_assigned_give_no_suggestion",
            "docs: DeepSpeed, Megatron",
        ],
    ),
    "17c": (
        "wrapped optimizers",
        [
            "a wrapper that holds the optimizer (Accelerate's way)",
            "test_gradients.py::test_wrappers_are_unwrapped_to_the_optimizer",
        ],
    ),
    "17d": (
        "rates set in closures, steps that raise, lr=None",
        [
            "test_learning_rates.py::test_a_rate_set_inside_the_closure_is_kept_and_scaled",
            "test_learning_rates.py::test_a_step_that_raised_leaves_the_loops_own_rate",
            "test_learning_rates.py::test_a_rate_that_is_computed_inside_the_step_is_refused",
        ],
    ),
    "18": ("optimizer in backward", ["optimizer step inside backward()"]),
    "19": (
        "two recorders",
        [
            "test_interception.py::test_two_recorders_may_be_closed_in_any_order",
            "test_interception.py::test_a_recorder_beside_one_that_clips_sees_the_unclipped_norm",
            "test_interception.py::test_of_two_recorders_that_impose_the_younger_wins_and_both_see_true_norms",
        ],
    ),
    "20": (
        "a hook that raises",
        [
            "test_interception.py::test_no_exception_leaves_a_hook",
            "test_interception.py::test_no_warning_leaves_a_hook_as_an_exception",
            "test_recorder.py::test_a_disk_that_stays_full_is_told_twice_and_raises_nothing",
        ],
    ),
    "21": (
        "a hook that returns a value",
        ["test_interception.py::test_a_closure_gets_through_as_argument_and_as_keyword"],
    ),
    "33b": (
        "one norm, several calls",
        [
            "one norm given to two clip_grads_with_norm_ calls",
            "test_distributed.py::test_plain_replicated_and_sharded_parameters_count_once_each",
        ],
    ),
    "34": (
        "several devices",
        ["test_recorder.py::test_values_of_several_devices_are_read_device_by_device"],
    ),
    "36": (
        "ends of a program",
        [
            "test_recorder.py::test_a_program_that_ends_without_close_loses_nothing",
            "test_recorder.py::test_rows_are_written_after_so_many_steps_and_after_two_seconds",
        ],
    ),
    "37": ("fork", ["test_recorder.py::test_a_forked_child_has_a_file_of_its_own"]),
    "40": ("two writers", ["test_records.py::test_two_writers_of_one_path_both_keep_their_lines"]),
    "41": (
        "threads",
        ["test_interception.py::test_a_thread_finds_the_recorder_of_its_own_parameters"],
    ),
    "42": (
        "torch.optim.optimizer as an attribute",
        ["test_interception.py::test_the_step_hooks_are_imported_by_their_own_name"],
    ),
    "43": (
        "fp16 norm above 65504",
        [
            "fp16 norm above 65504",
            "test_gradients.py::test_fp16_norms_above_65504_are_finite",
        ],
    ),
    "44": (
        "bf16",
        [
            "bf16 parameters",
            "test_recorder.py::test_norms_of_bf16_clips_are_not_quantised",
        ],
    ),
    "45": (
        "range of fp32",
        [
            "fp32 norm above 1e38",
            "fp32 norm below 1e-38",
            "test_gradients.py::test_fp32_norms_leave_neither_end_of_their_range",
        ],
    ),
    "46": (
        "accuracy of fp32",
        ["test_gradients.py::test_large_tensors_are_within_a_thousandth_of_fp64"],
    ),
    "47": (
        "clip at inf as a measurement",
        [
            "clip_grad_norm_(..., inf) as a measurement",
            "test_interception.py::test_an_imposed_inf_never_turns_gradients_into_nan",
        ],
    ),
    "48": (
        "non-finite gradients",
        [
            "non-finite gradients on two steps",
            "test_interception.py::test_non_finite_gradients_are_clipped_as_they_were",
        ],
    ),
    "49": ("error_if_nonfinite", ["error_if_nonfinite=True, caught"]),
    "50": (
        "max_norm 0, negative, nan",
        [
            "test_interception.py::test_strange_limits_of_the_loop_do_what_they_did",
            "test_recorder.py::test_a_wrong_argument_is_refused_before_anything_is_written",
        ],
    ),
    "51": (
        "norm equal to max_norm",
        ["test_gradients.py::test_a_norm_equal_to_the_limit_is_scaled_as_torch_scales_it"],
    ),
    "52": (
        "exhausted generators",
        [
            "clip on an exhausted filter()",
            "test_interception.py::test_an_exhausted_generator_gets_zero_and_torchs_own_warning",
        ],
    ),
    "53": (
        "no gradients",
        [
            "clip right after zero_grad()",
            "steps without any gradient",
            "test_interception.py::test_a_clip_on_no_gradient_is_no_norm_of_zero",
        ],
    ),
    "54": ("a parameter twice", ["a parameter passed twice"]),
    "55": (
        "sparse gradients",
        [
            "sparse embedding gradients",
            "test_gradients.py::test_sparse_gradients_are_summed_up_first_in_a_copy",
            "test_interception.py::test_sparse_gradients_fail_in_the_loops_own_clip_as_they_did",
        ],
    ),
    "56": (
        "complex gradients",
        [
            "complex and real parameters",
            "test_gradients.py::test_complex_gradients_count_by_their_absolute_value",
        ],
    ),
    "57": (
        "other norms",
        [
            "clip by the L1 norm",
            "test_recorder.py::test_the_norm_type_of_a_clip_call_is_kept",
        ],
    ),
    "58": ("value clips", ["clip_grad_value_", "clip by norm, then by value"]),
    "59": (
        "gradients changed by the step",
        ["nesterov, foreach: changes the gradients in the step"],
    ),
    "60": ("mixed dtypes", ["test_recorder.py::test_mixed_dtypes_with_an_overflowing_half"]),
    "61": (
        "create_graph=True",
        [
            "create_graph=True",
            "test_gradients.py::test_a_norm_keeps_no_graph_alive",
            "test_interception.py::test_gradients_are_not_kept_alive",
        ],
    ),
    "62": (
        "a norm that its owner changes",
        ["test_interception.py::test_the_returned_norm_may_be_changed_by_its_owner"],
    ),
    "63": (
        "bitwise identity",
        [
            "test_loops.py::test_parameters_and_random_state_are_bit_identical_with_a_recorder",
            "test_recorder.py::test_200_steps_with_a_recorder_are_bit_identical",
        ],
    ),
    "64": ("torch.compile anywhere", ["torch.compile of the model"]),
    "65": (
        "compiled step",
        [
            "torch.compile of the optimizer's step",
            "test_compile.py::test_graphs_and_operations_are_those_without_a_recorder",
        ],
    ),
    "66": (
        "compiled clip",
        [
            "torch.compile of the clip call",
            "torch.compile of a clip call on another model, right before the step",
            "torch.compile of one clip over two optimizers",
            "test_compile.py::test_a_compiled_clip_is_one_full_graph",
            "test_compile.py::test_an_imposed_max_norm_is_obeyed_whatever_is_compiled",
        ],
    ),
    "67": (
        "CUDA graphs",
        [
            "docs: CUDA graphs of a whole step",
            "test_recorder.py::test_steps_inside_a_cuda_graph_are_told_and_give_no_suggestion",
        ],
    ),
    "68": (
        "device reads",
        [
            "test_recorder.py::test_no_step_reads_a_device_and_each_flush_reads_it_once",
            "test_recorder.py::test_a_flush_reads_all_waiting_values_in_one_go",
        ],
    ),
    "69": (
        "isfinite waits for the device",
        ["test_recorder.py::test_no_step_reads_a_device_and_each_flush_reads_it_once"],
    ),
    "70": (
        "SIGKILL",
        [
            "test_records.py::test_sigkill_loses_no_written_line_and_tears_none",
            "test_recorder.py::test_sigkill_costs_at_most_the_steps_since_the_last_flush",
        ],
    ),
    "71": (
        "full disk",
        [
            "test_records.py::test_what_a_full_disk_took_in_part_is_repeated_when_there_is_room",
            "test_recorder.py::test_a_full_disk_ends_no_training_and_loses_no_row",
        ],
    ),
    "72": (
        "append after a torn line",
        ["test_records.py::test_an_append_after_a_torn_line_loses_only_the_torn_line"],
    ),
    "73": ("a number cut short", ["test_records.py::test_a_number_that_was_cut_is_not_read"]),
    "22": (
        "rank 0 alone",
        [
            "test_distributed.py::test_a_recorder_on_rank_0_alone_lets_the_training_go_on",
            "test_distributed.py::test_a_recorder_that_one_rank_closes_ends_on_the_others",
        ],
    ),
    "23": (
        "the norm of shards",
        [
            "test_distributed.py::test_each_rank_has_the_norm_of_the_whole_model",
        ],
    ),
    "25": (
        "FSDP1",
        [
            "test_distributed.py::test_each_rank_has_the_norm_of_the_whole_model",
            "test_distributed.py::test_fsdp1_without_its_clip_call_is_not_recorded",
        ],
    ),
    "24": (
        "a DTensor in a format string",
        [
            "test_distributed.py::test_a_sharded_norm_that_an_engine_knows_is_a_number_of_the_whole_model",
        ],
    ),
    "26": (
        "sharded and plain parameters",
        [
            "test_distributed.py::test_plain_replicated_and_sharded_parameters_count_once_each",
            "test_distributed.py::test_an_imposed_max_norm_clips_a_mix_that_torch_refuses",
        ],
    ),
    "27": (
        "two meshes",
        [
            "test_distributed.py::test_plain_replicated_and_sharded_parameters_count_once_each",
            "test_distributed.py::test_an_imposed_max_norm_clips_a_mix_that_torch_refuses",
        ],
    ),
    "28": (
        "replicated parameters counted twice",
        [
            "test_distributed.py::test_plain_replicated_and_sharded_parameters_count_once_each",
        ],
    ),
    "29": (
        "a rank without gradients, or that leaves early",
        [
            "test_distributed.py::test_plain_replicated_and_sharded_parameters_count_once_each",
            "test_distributed.py::test_a_recorder_that_breaks_on_one_rank_makes_no_rank_wait",
        ],
    ),
    "30": (
        "DDP and no_sync",
        [
            "test_distributed.py::test_accumulation_in_no_sync_gives_the_norm_of_the_reduced_sum",
            "test_distributed.py::test_ranks_that_train_by_themselves_have_a_record_each_and_a_finding",
        ],
    ),
    "31": (
        "logs of ranks that differ",
        [
            "test_sources.py::test_ranks_that_tell_other_norms_are_doubted",
            "test_sources.py::test_steps_with_several_values_are_doubted",
        ],
    ),
    "32": (
        "DeepSpeed",
        [
            "docs: **DeepSpeed, Megatron, NeMo, fairseq**",
        ],
    ),
    "33": (
        "pipeline parallel",
        [
            "docs: **Pipeline parallel.**",
        ],
    ),
    "35": (
        "an unmodified script",
        [
            "test_launch.py::test_the_command_keeps_its_output_folder_and_parameters",
        ],
    ),
    "36b": (
        "signals of a command",
        [
            "test_launch.py::test_signals_are_handed_on_and_the_commands_answer_is_awaited",
            "test_launch.py::test_a_command_that_a_signal_ends_gets_the_exit_code_of_a_shell",
        ],
    ),
    "38": (
        "data workers of a forked training",
        [
            "test_launch.py::test_a_training_in_a_forked_process_and_two_in_a_row_are_told_apart",
        ],
    ),
    "39": (
        "spawned and launched processes",
        [
            "test_launch.py::test_mp_spawn_inside_the_script_is_followed",
            "test_launch.py::test_torchrun_with_two_ranks_gives_one_record_and_ends_after_the_steps_asked_for",
            "test_launch.py::test_an_existing_sitecustomize_still_runs",
        ],
    ),
    "40b": (
        "a file for each process",
        [
            "test_launch.py::test_records_are_merged_so_that_the_longest_is_read",
        ],
    ),
    "41b": (
        "two training threads of a command",
        [
            "test_automatic.py::test_two_training_threads_have_a_record_each",
        ],
    ),
    "74": (
        "a file rewritten as a whole",
        [
            "test_records.py::test_sigkill_loses_no_written_line_and_tears_none",
            "test_reports.py::test_a_report_for_which_there_is_no_room_leaves_the_old_one_whole",
        ],
    ),
    "75": ("NaN in JSON", ["test_records.py::test_every_line_is_strict_json"]),
    "76": (
        "resume",
        [
            "test_records.py::test_an_attempt_that_continues_another_takes_over_its_repeated_steps",
            "test_recorder.py::test_a_restart_from_an_older_checkpoint_repeats_steps",
            "test_recorder.py::test_resume_counts_on_in_every_series",
        ],
    ),
    "77": (
        "clocks",
        ["test_records.py::test_steps_are_ordered_by_attempt_and_step_never_by_time"],
    ),
    "78": (
        "a live file",
        [
            "test_records.py::test_a_live_file_is_read_without_its_unfinished_line",
            "test_recorder.py::test_a_live_record_can_be_read_at_any_moment",
        ],
    ),
    "79": (
        "ascii terminals and closed pipes",
        ["test_cli.py::test_an_ascii_terminal_and_a_closed_pipe_end_quietly"],
    ),
    "80": (
        "diverged runs",
        [
            "test_controller.py::test_a_diverged_run_is_a_result",
            "test_ledger.py::test_a_diverged_run_is_the_worst",
            "test_commands.py::test_diverged_runs_are_results_and_a_rate_that_is_not_there_is_told",
            "test_metrics.py::test_a_pattern_for_digits_finds_what_is_not_finite",
        ],
    ),
    "81": (
        "infinite values",
        [
            "test_controller.py::test_a_diverged_run_is_a_result",
            "test_metrics.py::test_a_value_that_is_not_finite_counts_only_at_the_end",
        ],
    ),
    "82": (
        "an exception in a run",
        [
            "test_controller.py::test_three_crashes_in_a_row_stop_the_study",
            "test_commands.py::test_crashes_quote_the_last_lines_and_stop_the_study",
        ],
    ),
    "83": (
        "out of memory",
        [
            "test_commands.py::test_what_becomes_of_a_run",
        ],
    ),
    "84": (
        "SystemExit in a run",
        [
            "test_commands.py::test_what_becomes_of_a_run",
        ],
    ),
    "85": (
        "Ctrl-C",
        [
            "test_search.py::test_a_killed_study_ends_like_one_that_was_not",
            "test_commands.py::test_a_controller_that_is_killed_ten_times_at_random_moments_goes_on",
        ],
    ),
    "86": (
        "dead workers",
        [
            "test_worker.py::test_four_workers_of_which_two_are_killed_and_one_is_stopped",
            "test_storages.py::test_a_journal_file_is_never_opened",
        ],
    ),
    "87": (
        "a worker that lives past the grace period",
        ["test_worker.py::test_four_workers_of_which_two_are_killed_and_one_is_stopped"],
    ),
    "88": (
        "one run in two workers",
        ["test_worker.py::test_two_hundred_short_runs_are_each_trained_once"],
    ),
    "89": (
        "a budget over all workers",
        [
            "test_worker.py::test_one_worker_is_like_one_slot",
            "test_worker.py::test_four_workers_of_which_two_are_killed_and_one_is_stopped",
        ],
    ),
    "90": (
        "SQLite and several processes",
        ["test_storages.py::test_files_are_refused_for_several_processes"],
    ),
    "91": (
        "a torn journal file",
        ["test_storages.py::test_a_journal_file_is_never_opened"],
    ),
    "92": (
        "connections that a server drops",
        ["test_worker.py::test_a_server_that_is_restarted_loses_nothing"],
    ),
    "93": (
        "another study file",
        [
            "test_search.py::test_a_changed_study_is_refused",
            "test_commands.py::test_a_changed_script_is_refused",
            "test_study.py::test_fingerprint_sees_the_training",
        ],
    ),
    "94": (
        "bounds from bad norms",
        [
            "test_commands.py::test_norms_without_a_range_end_the_study_in_one_line",
            "test_baseline.py::test_the_range_reaches_below_the_norms_and_up_to_the_largest",
            "test_controller.py::test_an_unclipped_run_that_dies_early_gets_a_gentle_warm_up",
        ],
    ),
    "95": (
        "Muon",
        ["test_doubts.py::test_optimizers_with_their_own_meaning_of_clipping"],
    ),
    "96": (
        "YAML",
        [
            "test_study.py::test_a_fault_is_one_line_with_its_place",
            "test_study.py::test_scalars_mean_what_they_look_like",
            "test_study.py::test_aliases_cannot_grow",
            "test_commands.py::test_everything_of_a_command_line_comes_back_from_its_study",
        ],
    ),
    "97": (
        "pickle",
        [
            "test_security.py::test_nothing_that_is_read_is_run",
        ],
    ),
    "98": (
        "commands and shells",
        [
            "test_commands.py::test_only_the_two_tokens_are_replaced_and_no_shell_is_asked",
            "test_security.py::test_nothing_that_is_read_is_run",
        ],
    ),
    "99": (
        "passwords in storage URLs",
        [
            "test_storages.py::test_no_password_in_any_text",
            "test_security.py::test_a_storage_that_fails_never_shows_its_password",
            "test_commands.py::test_the_environment_of_a_run",
            "test_worker.py::test_the_password_is_nowhere",
        ],
    ),
    "100": (
        "tracebacks with locals",
        [
            "test_security.py::test_no_traceback_shows_local_variables",
        ],
    ),
    "101": (
        "HTML",
        [
            "test_pages.py::test_names_are_text_and_never_tags",
            "test_pages.py::test_the_page_loads_nothing",
        ],
    ),
    "102": (
        "rich markup",
        [
            "test_security.py::test_names_reach_the_progress_of_a_terminal_as_they_are",
        ],
    ),
    "103": (
        "control characters",
        [
            "test_cli.py::test_control_characters_never_reach_the_terminal",
        ],
    ),
}


@functools.cache
def names_in(file):
    """The names of the test functions of a file."""
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def exists(place):
    """Whether there is such a loop, test or sentence."""
    if place.startswith("docs: "):
        pages = [HERE.parent / "docs" / name for name in ("loops.md", "frameworks.md")]
        sentence = place.removeprefix("docs: ")
        return any(sentence in page.read_text(encoding="utf-8") for page in pages)
    if "::" in place:
        file, name = place.split("::")
        return name in names_in(file)
    return place in {case.name for case in loops.CASES}


@pytest.mark.parametrize(("case", "places"), ROWS.values(), ids=ROWS)
def test_every_known_failure_has_its_test(case, places):
    """A renamed test or loop is noticed here."""
    assert places
    assert [place for place in places if not exists(place)] == [], case


@pytest.mark.parametrize(
    "place", ["a loop of no kind", "test_loops.py::test_nothing", "docs: nothing of the kind"]
)
def test_a_missing_test_is_noticed(place):
    """The index can fail."""
    assert not exists(place)
