"""attention: masked by position alone, for many rows and for few, and a step's row never feels its neighbours."""

import pytest
import torch
from compare import assert_no_worse, differing

from kernels import attention as module
from kernels.attention import SplitWork, attention, attention_ref, step_attention, step_attention_ref

FLOATS = [torch.float32, torch.float16]
LOUD = 1e4                                                   # what stands in cache rows that nobody may see


def cache(N, M, K, dtype, device, filled):
    k_NMK, v_NMK = (torch.randn(N, M, K, device=device).to(dtype) for _ in range(2))
    k_NMK[:, filled:] = v_NMK[:, filled:] = LOUD
    return k_NMK, v_NMK


def step_case(S, first, H, N, M, K, dtype, device):
    qkv_SE = torch.randn(S, (H + 2 * N) * K, device=device).to(dtype)
    angle_MK = torch.randn(M, K // 2, device=device).repeat(1, 2)
    return (qkv_SE, *cache(N, M, K, dtype, device, first), first + torch.arange(S, device=device),
            angle_MK.cos().to(dtype), angle_MK.sin().to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("S, filled", [(1, 0), (1, 17), (1, 517), (6, 0), (6, 517), (32, 17), (33, 0), (33, 517),
                                       (70, 17), (70, 517)])
def test_no_further_from_the_truth_than_twice_plain_torch(S, filled, dtype, device, nan_empty):
    torch.manual_seed(S + filled)
    q_SHK = torch.randn(S, 2 if S == 32 else 4, 32, device=device).to(dtype)
    k_NMK, v_NMK = cache(2, 640, 32, dtype, device, filled + S)
    pos_ids_S = filled + torch.arange(S, device=device)
    truth = attention_ref(q_SHK.double(), k_NMK.double(), v_NMK.double(), pos_ids_S).float()
    plain = attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S, upcast=False)
    assert_no_worse(attention(q_SHK, k_NMK, v_NMK, pos_ids_S), plain, truth)


@pytest.mark.parametrize("S, K", [(3, 40), (40, 40), (40, 10)])
def test_head_width_need_not_be_a_power_of_two(S, K, device, nan_empty):
    q_SHK = torch.randn(S, 2, K, device=device)
    k_NMK, v_NMK = cache(2, 100, K, torch.float32, device, 50 + S)
    pos_ids_S = 50 + torch.arange(S, device=device)
    truth = attention_ref(q_SHK.double(), k_NMK.double(), v_NMK.double(), pos_ids_S).float()
    assert_no_worse(attention(q_SHK, k_NMK, v_NMK, pos_ids_S), attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S), truth)


def test_many_rows_see_a_cache_that_is_part_of_a_longer_one(device, nan_empty):
    buffer_2NMK = torch.randn(2, 2, 96, 16, device=device)   # the cache is the first 70 rows of every head
    buffer_2NMK[:, :, 70:] = LOUD
    q_SHK, (k_NMK, v_NMK) = torch.randn(40, 4, 16, device=device), buffer_2NMK[:, :, :70]
    pos_ids_S = 40 + torch.arange(40, device=device)         # the last ones lie behind its end
    truth = attention_ref(q_SHK.double(), k_NMK.double(), v_NMK.double(), pos_ids_S).float()
    assert_no_worse(attention(q_SHK, k_NMK, v_NMK, pos_ids_S), attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S), truth)


@pytest.mark.parametrize("S", [4, 40])
def test_positions_alone_decide_in_any_order(S, device):
    q_SHK = torch.randn(S, 2, 16, device=device)
    k_NMK, v_NMK = cache(2, 90, 16, torch.float32, device, 90)
    pos_ids_S = torch.randperm(90, device=device)[:S]
    together = attention(q_SHK, k_NMK, v_NMK, pos_ids_S)
    assert_no_worse(together, attention_ref(q_SHK, k_NMK, v_NMK, pos_ids_S),
                    attention_ref(q_SHK.double(), k_NMK.double(), v_NMK.double(), pos_ids_S).float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("S, first", [(1, 0), (1, 511), (5, 510), (17, 500), (32, 96), (32, 608)])
def test_a_step_turns_stores_and_attends_like_the_definition(S, first, dtype, device, nan_empty):
    torch.manual_seed(first)
    H, N = (4, 2) if S <= 5 else (1, 1)                      # a head and a row each are programs: slow without a GPU
    qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK = step_case(S, first, H, N, 640, 32, dtype, device)
    k_ref, v_ref = k_NMK.clone(), v_NMK.clone()
    ours = step_attention(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK, SplitWork(device, H, 32, 640))
    plain = step_attention_ref(qkv_SE, k_ref, v_ref, pos_ids_S, cos_MK, sin_MK)
    floor = 1e-5 if dtype == torch.float32 else 1e-3         # half an ulp of values up to 2: plain rounds once as well
    assert_no_worse(ours, plain, plain.float(), floor=floor)
    assert differing(k_NMK, k_ref) == differing(v_NMK, v_ref) == 0


@pytest.mark.parametrize("S", [1, 2, 6])
def test_a_step_writes_no_row_past_the_cache_and_touches_no_other(S, device):
    buffer_2NMK = torch.full((2, 2, 24, 16), 7.0, device=device)         # the cache is the first 20 rows of every head
    k_NMK, v_NMK = buffer_2NMK[0, :, :20], buffer_2NMK[1, :, :20]
    first = 17 if S > 2 else 19 if S == 2 else 20
    qkv_SE, _, _, pos_ids_S, cos_MK, sin_MK = step_case(S, first, 2, 2, 24, 16, torch.float32, device)
    out_SHK = step_attention(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK, SplitWork(device, 2, 16, 24))
    assert bool((buffer_2NMK[:, :, :first] == 7).all()) and bool((buffer_2NMK[:, :, 20:] == 7).all())
    assert not bool((buffer_2NMK[:, :, first:20] == 7).any()) and bool(out_SHK.isfinite().all())


def one_by_one(case, work):
    qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK = case
    return torch.cat([step_attention(qkv_SE[i:i + 1], k_NMK, v_NMK, pos_ids_S[i:i + 1], cos_MK, sin_MK, work)
                      for i in range(len(pos_ids_S))])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_bits_and_cache_bits_ignore_how_many_rows_there_are(dtype, device, monkeypatch):
    monkeypatch.setattr(module, "SPLIT", 64)                 # several splits in a small cache
    case = step_case(32, 104, 1, 1, 144, 16, dtype, device)
    work, (qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK) = SplitWork(device, 1, 16, 144), case
    single = (qkv_SE, k_NMK.clone(), v_NMK.clone(), *case[3:])
    rows = one_by_one(single, work)
    for S in (2, 17, 32):
        k, v = k_NMK.clone(), v_NMK.clone()
        together = step_attention(qkv_SE[:S], k, v, pos_ids_S[:S], cos_MK, sin_MK, work)
        assert differing(together, rows[:S]) == 0, f"{S} rows"
        assert differing(k[:, :104 + S], single[1][:, :104 + S]) == differing(v[:, :104 + S],
                                                                              single[2][:, :104 + S]) == 0


def test_the_fixed_split_is_what_keeps_the_bits(device, monkeypatch):
    """The inverse: split the cache otherwise for many rows than for one, as kernels tuned by row count do."""
    monkeypatch.setattr(module, "SPLIT", 32)
    case = step_case(3, 300, 1, 1, 320, 16, torch.float32, device)
    copy = (case[0], case[1].clone(), case[2].clone(), *case[3:])
    rows = one_by_one(copy, SplitWork(device, 1, 16, 320))
    monkeypatch.setattr(module, "SPLIT", 128)
    qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK = case
    together = step_attention(qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK, SplitWork(device, 1, 16, 320))
    assert differing(together, rows) > 0


def test_a_row_does_not_feel_what_its_neighbours_hold(device):
    work = SplitWork(device, 2, 16, 64)
    case = step_case(8, 20, 2, 2, 64, 16, torch.float32, device)
    qkv_SE, k_NMK, v_NMK, pos_ids_S, cos_MK, sin_MK = case
    clean = step_attention(qkv_SE, k_NMK.clone(), v_NMK.clone(), pos_ids_S, cos_MK, sin_MK, work)
    qkv_SE[5:] = LOUD                                        # later rows, which rows 0..4 do not see
    loud = step_attention(qkv_SE, k_NMK.clone(), v_NMK.clone(), pos_ids_S, cos_MK, sin_MK, work)
    assert differing(clean[:5], loud[:5]) == 0 and differing(clean[5:], loud[5:]) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 7, 32, 641, 2076])
def test_bf16_at_7b_shapes_is_no_further_than_twice_plain_torch(S, device, nan_empty):
    q_SHK = torch.randn(S, 32, 128, device=device, dtype=torch.bfloat16)
    k_NMK, v_NMK = cache(32, 2304, 128, torch.bfloat16, device, 100 + S)
    pos_ids_S = 100 + torch.arange(S, device=device)
    ours = attention(q_SHK, k_NMK, v_NMK, pos_ids_S)
    for head in (0, 31):                                     # a head at a time: the fp64 scores are large
        q, k, v = q_SHK[:, head:head + 1], k_NMK[head:head + 1], v_NMK[head:head + 1]
        truth = attention_ref(q.double(), k.double(), v.double(), pos_ids_S).float()
        assert_no_worse(ours[:, head:head + 1], attention_ref(q, k, v, pos_ids_S, upcast=False), truth)
