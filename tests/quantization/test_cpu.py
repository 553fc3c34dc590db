"""Flags of a CPU."""

from dist_compress.quantization import cpu

INFO = "processor : 0\nflags\t\t: fpu sse2 avx2 {}\n\nprocessor : 1\nflags\t\t: fpu\n"


def test_dot_products_are_found_in_the_flags():
    assert "avx_vnni" in cpu.flags(INFO.format("avx_vnni"))
    assert not cpu.flags(INFO.format("avx512f")) & cpu._DOT_PRODUCTS
    assert cpu.flags("") == set()
    assert cpu.flags("Features\t: fp asimddp\n") & cpu._DOT_PRODUCTS == {"asimddp"}
    assert set(cpu.dot_products()) <= cpu._DOT_PRODUCTS
    assert isinstance(cpu.needs_reduced_range(), bool)
