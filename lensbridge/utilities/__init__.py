"""Helpers that do not depend on a model class: tensors, tokens, logits, names, devices, downloads.

The names are those of ``transformer_lens.utilities``, in submodules of the same names.
"""

from .activation_functions import (
    SOFTCAP_DISABLED,
    SUPPORTED_ACTIVATIONS,
    ActivationFunction,
    apply_softcap,
    gelu_fast,
    gelu_new,
    softcap_enabled,
    solu,
)
from .attribute_utils import get_nested_attr, set_nested_attr
from .components_utils import get_act_name
from .defaults_utils import USE_DEFAULT_VALUE, LocallyOverridenDefaults, override_or_use_default_value
from .devices import ModelWithCfg, get_device, move_to_and_update_config, warn_if_mps
from .exploratory_utils import test_prompt
from .gpu_utils import print_gpu_mem
from .hf_utils import (
    clear_huggingface_cache,
    download_file_from_hf,
    get_dataset,
    get_rotary_pct_from_config,
    keep_single_column,
    select_compatible_kwargs,
)
from .initialization_utils import (
    NonlinearityType,
    calc_fan_in_and_fan_out,
    init_kaiming_normal_,
    init_kaiming_uniform_,
    init_xavier_normal_,
    init_xavier_uniform_,
)
from .library_utils import is_library_available
from .lm_utils import lm_accuracy, lm_cross_entropy_loss
from .logits_utils import logits_to_df, sample_logits
from .matrix import composition_scores, get_matrix_corner
from .multi_gpu import (
    calculate_available_device_cuda_memory,
    count_unique_devices,
    determine_available_memory_for_available_devices,
    find_embedding_device,
    get_best_available_cuda_device,
    get_best_available_device,
    get_device_for_block_index,
    resolve_device_map,
    sort_devices_based_on_available_memory,
)
from .parameter_swap import temporarily_swap_parameter
from .slice import Slice, SliceInput
from .tensors import (
    check_structure,
    filter_dict_by_prefix,
    get_corner,
    get_cumsum_along_dim,
    get_offset_position_ids,
    is_lower_triangular,
    is_square,
    remove_batch_dim,
    repeat_along_head_dimension,
    to_numpy,
    transpose,
)
from .tokenize_utils import (
    get_attention_mask,
    get_input_with_manually_prepended_bos,
    get_tokenizer_with_bos,
    get_tokens_with_bos_removed,
    tokenize_and_concatenate,
)
from .typed_module_list import TypedModuleList

__all__ = [
    "SOFTCAP_DISABLED",
    "SUPPORTED_ACTIVATIONS",
    "USE_DEFAULT_VALUE",
    "ActivationFunction",
    "LocallyOverridenDefaults",
    "ModelWithCfg",
    "NonlinearityType",
    "Slice",
    "SliceInput",
    "TypedModuleList",
    "apply_softcap",
    "calc_fan_in_and_fan_out",
    "calculate_available_device_cuda_memory",
    "check_structure",
    "clear_huggingface_cache",
    "composition_scores",
    "count_unique_devices",
    "determine_available_memory_for_available_devices",
    "download_file_from_hf",
    "filter_dict_by_prefix",
    "find_embedding_device",
    "gelu_fast",
    "gelu_new",
    "get_act_name",
    "get_attention_mask",
    "get_best_available_cuda_device",
    "get_best_available_device",
    "get_corner",
    "get_cumsum_along_dim",
    "get_dataset",
    "get_device",
    "get_device_for_block_index",
    "get_input_with_manually_prepended_bos",
    "get_matrix_corner",
    "get_nested_attr",
    "get_offset_position_ids",
    "get_rotary_pct_from_config",
    "get_tokenizer_with_bos",
    "get_tokens_with_bos_removed",
    "init_kaiming_normal_",
    "init_kaiming_uniform_",
    "init_xavier_normal_",
    "init_xavier_uniform_",
    "is_library_available",
    "is_lower_triangular",
    "is_square",
    "keep_single_column",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "logits_to_df",
    "move_to_and_update_config",
    "override_or_use_default_value",
    "print_gpu_mem",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "resolve_device_map",
    "sample_logits",
    "select_compatible_kwargs",
    "set_nested_attr",
    "softcap_enabled",
    "solu",
    "sort_devices_based_on_available_memory",
    "temporarily_swap_parameter",
    "test_prompt",
    "to_numpy",
    "tokenize_and_concatenate",
    "transpose",
    "warn_if_mps",
]
