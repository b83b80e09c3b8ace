"""The markers of transformers' common tests, which pytest must know."""

MARKERS = """
accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test is_agent_test is_expert_parallel_test is_fsdp_test
is_pipeline_test is_staging_test is_tensor_parallel_test is_training_test order slow torch_compile_test
""".split()


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")
