"""Wrong versions of the CUDA kernels, which the tests must notice.

One library holds them all (mutant schemata): every marked expression becomes ``simt::mutant == k ? new : old``, so that
one compilation serves, and a process chooses its mutant at run time. A line of the table is

    file, context with the «replaced» text, what replaces it, what is wrong

The context must occur once in the file, whatever its line breaks; replaced text that ends with ";" is a
statement. A change of the kernels that moves a context is an error here: change the table with it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import emulation


class Mutant(NamedTuple):
    file: str  # of csrc
    context: str
    new: str
    why: str

    @property
    def old(self) -> str:
        return re.search("«(.*)»", self.context, re.S)[1]


_POSITIVES = (
    (
        "if (threadIdx.x == 0) next = end; «__syncthreads();»",
        ";",
        "no barrier before the warps' sums are read",
    ),
    (
        "if (own > slot) atomicMin(&next, own); «__syncthreads();»",
        ";",
        "no barrier between two sums in one scratch",
    ),
    ("sum += «scratch[i * kPartials + threadIdx.x]»;", "scratch[threadIdx.x]", "the first warp's sums for all"),
    (
        "while (l + 1 < tb.levels && «number >= tb.level[l + 1].tile0»",
        "number > tb.level[l + 1].tile0",
        "level off by one",
    ),
    ("words(«kUnitsPerTile / groups»)", "kUnitsPerTile / groups + 1", "more units than a tile has bits"),
    ("group0 = «(of_image - row * shape.across) * shape.groups»;", "0", "the first groups of many again"),
    ("positions = «all < words * kWarp» ?", "false", "positions past the tile's words"),
    ("level.first_anchor + «int64_t(word0) * kWarp * level_groups»;", "0", "every tile has the first one's anchors"),
    ("image * tb.anchors_per_image + «level.first_anchor»", "0", "every level's anchors are the first's"),
    ("(«image * level_groups + group0 + unit % groups») * level.words", "image + unit % groups", "bits in wrong words"),
    ("+ word0 + «unit / groups»; }", "0", "the bits of a tile's words over each other"),
    ("return {l, image, «group0 + group», word0", "0", "another anchor's place"),
    ("word0 * kWarp + position, «anchor(position, group)»", "anchor(position, 0)", "a neighbour's values"),
    ("if («!collect && value == kBackground») return;", "!collect", "ignored rows look like plain background"),
    (
        "unit = «position / kWarp * tile.groups + group», bit",
        "position / kWarp + group",
        "bits of units over each other",
    ),
    ("if («collect») atomicOr(&bits.collected", "true", "ignored rows are computed"),
    ("const bool aligned = «reinterpret_cast<uintptr_t>(run) % 16 == 0»;", "true", "vectors of misaligned values"),
    ("if («!problem.plain(kBackground)») rest", "false", "scopes of background rows are not looked at"),
    ("if («i < count») look_at(tile", "true", "anchors past the last one"),
    ("if (lane == kWarp - 1) counts[warp] = at; «__syncthreads();»", ";", "warps' counts read before written"),
    ("at += «i < warp ? counts[i] : 0»;", "0", "list places of all warps over each other"),
    ("«at -= __popc(own);»", ";", "a unit's anchors after its place"),
    ("__ffs(static_cast<int>(left)) - 1); } «__syncthreads();»", ";", "the list read before it is written"),
    (
        "for (u32 first = 0; «first < count»; first += kPositiveThreads)",
        "first == 0 && count > 0",
        "positives past 128 dropped",
    ),
    ("tb.ignored[word] = special & «~bits.collected[threadIdx.x]»;", "~0u", "positives count as ignored"),
    ("«tb.clear[i] = 0;»", ";", "words not cleared"),
    ("first < count; «first += kStretch») {", "first = count", "anchors past a thread's first 16"),
    ("own = «terms.slot < 0» ? 0", "false", "bad rows are not counted"),
    ("if («own > slot») atomicMin", "own > slot + 1", "a slot left out behind the one before"),
    ("slot = next; «__syncthreads();»", ";", "the next slot read after it is reset"),
    (
        "tb.partial + static_cast<int64_t>(number) * «tb.slots * kPartials»",
        "kPartials",
        "sums of tiles over each other",
    ),
    ("} «__syncthreads();» if (tb.special && threadIdx.x", ";", "bits read before they are set"),
)
_COEFFICIENTS = (
    ("if (lane < kPartials) to[lane] = all; } «__syncthreads();»", ";", "sums read before written"),
    ("tb.segment_sums[i] = sum; } «__syncthreads();»", ";", "sums of several warps read before written"),
    ("«k < share»; ++k) sum += pieces", "k + 1 < share", "a warp's piece of a segment dropped"),
    ("sums.data[i] = sum; } «__syncthreads();»", ";", "the normalisers before their sums"),
    ("loc_loss, «scratch + kCoefficientWarps»)", "scratch", "two sums in one scratch"),
    ("first + «k * kStep»;", "0", "zeros in the first piece alone"),
    ("if («at + 16 <= bytes») {", "true", "zeros past the end"),
    ("rest < bytes; «rest += 2»)", "rest = bytes", "the last zeros missing"),
    ("«tile >= tb.tile0[i + 1]») ++i;", "false", "zeros of the first tensor alone"),
    ("count_up(tb.ticket) == gridDim.x - 1; «__syncthreads();»", ";", "who is last read before it is known"),
    ("«*tb.ticket = 0;»", ";", "the ticket is not reset"),
    ("count_up(tb.ticket) == «gridDim.x - 1»", "gridDim.x / 2", "a block in the middle adds up"),
    ("tb.segment(s).scope == «row - 1»", "row", "the next scope's sums"),
    ("* kTogether + row, «segment.count», share", "segment.count - 1", "the last tile dropped"),
    (
        "k < kTogether; ++k) all += __shfl_down_sync(~0u, sum, «k * kPartials»);",
        "kPartials",
        "every third tile dropped",
    ),
    ("tile0[level] + «image * tiles[level]»", "image", "tiles of other images"),
    ("sums.cls_normalizer(i, «tb.eps»)", "0.0", "eps dropped"),
    ("tb.loc_norm[i] = static_cast<float>(«tb.normalize_loc»", "!tb.normalize_loc", "Eq. 6 for 7"),
    (
        "tb.negative[i] = static_cast<float>(«tb.focal.negative_factor()»",
        "tb.focal.positive_factor()",
        "alpha for 1 - alpha",
    ),
    ("const double loc = tb.w_loc / tb.divisor(«tb.loc_divisor»", "tb.cls_divisor", "the other loss's divisor"),
    ("bad ? NAN : «tb.rows_count_all» ?", "false", "softmax positives counted twice"),
    ("const bool bad = «sums.shared(Sums::kBad) != 0»", "false", "bad labels do not poison"),
    ("«count > 0» ? static_cast<float>", "true", "0 / 0 as mean IoU"),
    ("column == Sums::kClsPlain ? «kPartClsPlain»", "kPartClsWeighted", "S is D"),
    ("static_cast<float>(sum + «*tb.positives_loss»)", "0.f", "the positives' loss is lost"),
)
_FOCAL = (
    ("(«value != kBackground && value != kIgnore») || scope", "value != kBackground", "ignored rows as positives"),
    ("value < kIgnore || «value >= classes» ||", "false", "a label past the classes as an index"),
    ("weight[row] = static_cast<float>(balance * «sample»)", "1.0", "the positives' row weight"),
    ("«out.slot = scope_id;»", ";", "every positive in the first scope"),
)
_DEVICE = (
    ("scratch[threadIdx.x / kWarp] = value; «__syncthreads();»", ";", "warps' sums read before written"),
    ("value += «threadIdx.x % kWarp >= distance ? before : 0»;", "before", "places in a list off in the first lanes"),
    (
        "«threadIdx.x < kBlock / kWarp» ? scratch[threadIdx.x]",
        "threadIdx.x + 1 < kBlock / kWarp",
        "the last warp's sum dropped",
    ),
    ("__umulhi(2 * n, multiplier) >> «shift»", "(shift ? shift - 1 : 0)", "division by half"),
    ("tensor[«per_image ? image : 0»]", "0", "one divisor for all images"),
    ("words[j / 2] & 0xffff0000u : «words[j / 2] << 16»", "words[j / 2]", "bfloat16 with its neighbour's bits"),
)
_TABLES = (
    ("«label >= 0 && label < classes» ? label", "label >= 0", "a class beyond the last as an index"),
    ("return «value == kIgnore» ? kIgnore", "false", "ignored rows count as background"),
    ("«value < truth.count(image)» ? truth.label", "value <= truth.count(image)", "one box too many"),
    ("«id >= 0 && id < count» ? id : -1", "id >= 0", "a scope out of range as an index"),
    ("level * level_step + «image * image_step»", "0", "one scope for all images"),
    ("4 * («own ? anchor : anchor - image * per_image»)", "anchor - image * per_image", "the first image's anchors"),
    ("location / width * row + «location % width * column»", "location % width * row", "a column for a row"),
    ("four(4 * («padded ? image * counts[0] + i : i»)", "i", "the first image's boxes"),
)
_DETECTION = (
    ("«is_degenerate(anchor) || is_degenerate(gt)»", "is_degenerate(anchor)", "gt boxes without area"),
    ("iou_power(iou, «focal.eta»)", "loc.lambda", "lambda for eta"),
    ("loc_weight[place.anchor] = «degenerate» ?", "false", "0^0 of degenerate boxes"),
    (
        "«(a * classes + label) * level.locations + location»",
        "(label * level.anchors + a) * level.locations + location",
        "channel order k, a",
    ),
    ("«label < 0» || label >= classes", "false", "padding boxes as positives"),
)
_EXACT = (
    (
        "gradient = «positive_entry<kGamma>(logit, weight * scale, tb.gamma, loss)»;",
        "-positive_entry<kGamma>(logit, weight * scale, tb.gamma, loss)",
        "the sign of a positive's gradient",
    ),
    ("ignored || positive ? kOff : «logit»", "logit + 1.f", "the one-by-one path's logit"),
    ("if («positive») { value = positive_value", "false", "positives keep a negative's place"),
    (
        "tb.coefficients.positive[run.image] * «tb.coefficients.cls_norm[scope]»",
        "tb.coefficients.cls_norm[0]",
        "the first scope's normaliser",
    ),
    ("«sum = fmaf(loss, w, sum);»", "sum += loss;", "row weights ignored"),
    ("k = «e - position * tb.classes.divisor»;", "e - position * tb.classes.divisor + 1", "the class before the label"),
    (
        "position = (e - plane * run.level->locations) * run.level->anchors + «a»;",
        "0",
        "the first anchor of a location",
    ),
    ("marks.off |= «((1u << width) - 1) << j»;", "1u << j", "the first entry of an ignored row alone"),
    (
        "at = «j + static_cast<u32>(label) - column»;",
        "j + static_cast<u32>(label)",
        "a positive's place in a vector within its row",
    ),
    ("«location = 0;» ++plane;", ";", "a vector's second plane from where the first ended"),
    ("label == plane - «a * tb.classes.divisor») {", "0", "planes past the first anchor's have no positive"),
    ("store_one(out + j, «marks.value(j)»);", "marks.value(0)", "a vector's first positive for all"),
    ("sum = fmaf(«kHalf * doubled», marks.weight", "doubled", "twice the loss of a vector"),
    ("sum = fmaf(kHalf * doubled, «marks.weight», sum);", "1.f", "the loss of weighted rows without the weight"),
    ("return «doubled < 1e35f»;", "true", "NaN derivatives of infinite logits kept"),
    ("first = «begin < run.missing ? 0 : begin - run.missing»;", "begin - run.missing", "a head before the run"),
    ("last = «end < size + run.missing» ? end", "true", "a vector past the end"),
    ("e < «last»; ++e) any_entry", "last - 1", "the last entry missed"),
    ("tb.coefficients.negative[«number»] * tb.scale_now()", "0", "the first image's divisor"),
    (
        "number * of.image_stride), out(static_cast<T*>(of.out) + «number * of.image_stride»)",
        "0",
        "one image's gradient",
    ),
)
_DENSE = (
    ("& 1) off |= ((1u << width) - 1) << «j»; j += width;", "0", "the second row of a vector unseen"),
    ("tb.classes.div(plane) * level.words + «location / kWarp»; off", "0", "bits of the plane's first locations"),
    (
        "(__funnelshift_r(word[0], word[1], location % kWarp) & ((1u << width) - 1)) << «j»;",
        "0",
        "planes over each other",
    ),
    ("own = ignored_of_row<kCount>(tb, ignored, «at»);", "e", "the first vector's ignored rows for all"),
    ("own = ignored_of_plane<kCount>(tb, level, ignored, «at»);", "e", "ignored locations of the first strip alone"),
    ("at = word + «u * kStep / kWarp»;", "0", "the first vector's ignored locations for all"),
    ("__funnelshift_r(at[0], «at[1]», location % kWarp)", "0u", "locations in the next word unseen"),
    (
        "if («location + (kStripsPerWarp - 1) * kStep + kCount <= level.locations») {",
        "true",
        "planes after the first one's unseen",
    ),
    ("v.words[0] & «v.words[1]» & v.words[2]", "v.words[0]", "logits above 0 unseen"),
    ("level.size >= kReach && «start <= level.size - kReach» &&", "true", "a warp past the end"),
    ("if («level.size >= kReach» && start", "true", "a warp past the end of less than its share"),
    ("if (end > groups) «end = groups;»", ";", "shares of the next tile, too"),
    ("later |= («~__shfl_sync(~0u, marks, i)» & kWarpStrips)", "~0u", "strips with a positive done twice"),
    ("& kWarpStrips) << «i * kStripsPerWarp»; }; leave", "0", "later vectors elsewhere"),
    ("if («mark == 0» && plain", "true", "positive entries done as negatives"),
    ("if («mark >> u & 1») continue;", "false", "positive entries of a marked share done as negatives"),
    ("__any_sync(~0u, «any_above<T>(in)») != 0;", "false", "logits above 0 as if below"),
    ("bit = 1u << i * «kStripsPerWarp»;", "0", "later vectors in the first group"),
    ("u * kStep, sum, later, bit << «u»);", "0", "later vectors in the first strip"),
    ("«tb.classes.divisor + 1 >= kCount»;", "true", "two weights for vectors across three rows"),
    ("j < split ? first : «second»;", "first", "one weight for vectors across rows"),
    ("«(row + 1) * tb.classes.divisor» - at;", "row * tb.classes.divisor + 1", "the next row's weight too early"),
    ("tb.row_weight[«anchor + 1»]", "anchor + 2", "the weight of another row"),
    ("(factor.rest * «weight»);", "1.f", "gradients without their row's weight"),
    ("{ «later |= bit;» return; } sum += weighted;", ";", "weighted vectors that are not finite left as they were"),
    ("weighted = fmaf(loss, «weight», weighted);", "1.f", "losses without their row's weight, in the loop"),
    ("{ «later |= bit;» return; } sum = total;", ";", "vectors whose loss is not finite left as they were"),
    ("s = 1.f; «rest = scale;»", ";", "a gradient where its factor is 0"),
    ("value *= «times»;", "2.f", "a factor that cannot be folded in"),
    ("kFolded ? «sum * s * s» : sum", "sum * s", "a folded sum as the loss"),
    ("own[j] = «at < tb.positive_groups» &&", "true", "strips of the next tiles, too"),
    ("«next += kFillWarps;»", "next += 2 * kFillWarps;", "every second strip of a warp"),
    ("group -= «image * tb.level[l].groups»;", "0", "strips of the first image for all"),
    ("strip = «warp * kStripsPerWarp» + bit % kStripsPerWarp;", "0", "later vectors of the first warp for all"),
)
_STRIPS = (
    ("return static_cast<u32>(start % 16) / «size_of_element»;", "1u", "a head of bytes"),
    ("last = («first + count - 1» + missing)", "first", "the first strip of a row alone"),
    ("«1u << strip % kGroupStrips»);", "1u", "the first strip of a group for all"),
    ("position = (local - image * per_image - a * of.words) * kWarp + «bit»;", "0", "the first anchor of a word"),
    ("of.first_anchor + position * of.anchors + «a»;", "0", "the first anchor of a location in a word"),
    ("if («!level.planes») mark_strips", "false", "ignored rows unmarked"),
    ("(level.planes) { if («label < 0») continue;", "false", "planes of no class"),
    ("at.position * classes + «static_cast<u32>(label)», 1", "0", "the strip of a row's first class"),
    ("plane * level.locations + «at.position», 1", "0", "the strip of a plane's first location"),
    ("(planes ? «anchors * words» : words)", "words", "an image's planes over each other"),
)
_MATH = (
    ("return -negative_entry<kGamma, false, true>(«-x», s", "x", "a positive with a negative's probability"),
    ("const float capped = kSafe ? «fminf(softplus, 1e30f)»", "softplus", "0 * inf at infinite logits"),
    ("return «fabsf(s)» > 1e-12f", "1.f", "a factor of 0 to divide by"),
    ("> «1e-12f» && fabsf(s)", "1e-30f", "losses that vanish beside a small factor"),
    ("fmaf(«s», other, e) : e + other", "1.f", "e + p of a folded p"),
    ("fmaf(«-s», other, e) : e - other", "-1.f", "e - p of a folded p"),
    ("modulator = «gamma == 0.f» ? 1.f", "false", "0 * inf for gamma = 0"),
    ("softplus = «kSafe ? kHalf * log1pe : log1pe»;", "log1pe", "twice the loss of entries done by themselves"),
    ("softplus = fmaf(«kTimes», fmaxf(x, 0.f), softplus);", "1.f", "half the loss above 0"),
    ("one_minus_p = «kBelow || x < 0.f ? r : other»;", "r", "1 - p of large logits"),
    ("fmaf(«kOnce * one_minus_p», capped, p); } else if", "one_minus_p", "a term of gamma 1's derivative"),
    ("log_p = fmaf(«-kHalf», log1pe", "-1.f", "a squared probability for any gamma"),
    ("fmaf(both * m, «log1p_slope<kGamma == -1>(m)», both);", "0.f", "log1p without its polynomial"),
)
_FILL = (
    ("«if (weight == 0.f) return out;»", ";", "a positive without area gets a gradient"),
    ("c.location[image] * «c.loc_norm[scope]» * weight", "1.f", "the localisation normaliser"),
    ("const u32 row = (chunk * kLocRepeat + «k») * kFillThreads", "0", "rows written four times, others never"),
    ("if («location >= level.locations») break;", "location > level.locations", "a location past the end"),
    ("if («labels.get(image, anchor) >= 0») {", "labels.get(image, anchor) > 0", "positives of class 0"),
    ("if («dense.labels.get(at.image, at.anchor) < 0») continue;", "false", "deltas of bad matches"),
    ("owner + step - 1) <= «item») owner", "item - 1", "another lane's positives"),
    ("before = «item + __popc(left) - __shfl_sync(~0u, end, owner)»;", "0", "a word's first positive for all of it"),
    ("if («item >= count») continue;", "false", "the last positive's again, or none's"),
    ("first < «count»; first += kWarp", "(count < kWarp ? count : kWarp)", "positives past a warp's 32"),
    (
        "«dense.level[at.level].planes ? at.a : at.position - location * level.anchors»;",
        "0",
        "the first anchor's place",
    ),
    ("if («!tb.deltas.filled()») deltas_tile(tb, dense", "true", "deltas that need nothing written again"),
    ("tile == round * turn.divisor && «round < deltas.tiles»;", "true", "more tiles than the deltas have"),
    ("tile - («round < deltas.tiles ? round + 1 : deltas.tiles»);", "round + 1", "the logits' last tiles again"),
    ("tb.deltas.tiles == 0 || «tb.deltas.filled()») &&", "!tb.deltas.filled()", "the predicate inverted"),
    ("if («tb.dense.filled()») continue;", "false", "a pass for nothing"),
    ("all.four(level.place.offset(image, location, level.width, «a»)", "0", "the first anchor's deltas"),
    ("out.set(at + j * «level.out_place.coordinate»", "1", "strided coordinates"),
)
_SOFTMAX = (
    ("lane() + i * kLanes < «columns») f(", "columns - 1", "the last column of a row"),
    ("k == target ? «-row.others»", "row.others", "the sign of the target's gradient"),
    ("«total += __shfl_xor_sync(~0u, total, offset);»", ";", "a lane's share of the sum"),
    ("target % kLanes, «kLanes»);", "kWarp", "the target's logit of another row"),
    ("positive = !bad && label >= 0 && «label != tb.background»", "true", "background rows as positives"),
    ("row.load(x + static_cast<int64_t>(«i») * columns", "0", "the warp's first row for the first one"),
    ("after.load(x + static_cast<int64_t>(«next») * columns", "i", "a row again instead of the next"),
    ("k < «place»; ++k) mine &= mine - 1;", "0", "the same row for all lanes"),
    ("none = «mine == 0»;", "false", "lanes without a row write"),
    ("store_one(to + k, «0.f»);", "1.f", "ignored rows' gradient"),
    ("return __shfl_sync(~0u, limit, «0», row.kLanes);", "1", "limits of a lane that has none"),
    ("return «at_target > 0.5f» ? log1pf", "at_target > 2.f", "the cancelling form for confident rows"),
    ("loaded[j] = «k + j * kLanes < columns» ?", "k + j * kLanes < columns - 1", "the last column of a wide row"),
    ("if («k + j * kLanes < columns») f(k", "true", "columns after the last one of a wide row"),
    ("k < columns; «k += kBatch * kLanes») {", "k = columns", "columns after a wide row's first ones"),
)
_SMOOTH_L1 = (
    ("weight.get(weight_columns == 2 ? «4 * r + j» : r, 1.0)", "r", "one weight for four coordinates"),
    ("if («lambda != 0») row.balance", "false", "no IoU weight"),
    ("tb.w_loc * tb.grad_rows[«r»]", "0", "the first row's grad_output"),
    ("const double w = «scope < 0» ? NAN", "false", "a bad scope as an index"),
)
_BOXES = (
    ("r < «tb.rows»; r +=", "tb.rows - 1", "the last box"),
    ("decode_box_backward(«a», b, BoxTable", "b", "gradient and deltas swapped"),
)
_RESCALE = (
    ("if («first < tb.head») store_one", "false", "the head keeps its scale"),
    ("if («rest + first < tb.count») store_one", "false", "the tail keeps its scale"),
)
_MATCHING = (
    ("if («place >= truth.count(image)») return none;", "place > truth.count(image)", "one box too many"),
    ("truth.labels[«truth.padded ? 0 : image»] &&", "0", "the first image's labels decide"),
    ("«truth.label(image, place) == kNoLabel») return none;", "truth.label(image, place) < 0", "every negative label"),
    ("return «is_nan(iou)» ? kNanRank", "false", "a NaN by its bits"),
    ("float_to_bits(iou) & «0x7fffffffu»;", "0xffffffffu", "-0 as the largest IoU"),
    ("static_cast<Key>(rank) << 32 | «~anchor»;", "anchor", "the last of equal anchors"),
    ("boxes = «image * tb.places»; BestBox", "0", "the first image's boxes"),
    ("static_cast<const Float16*>(anchors.data) + «4 * row»", "row", "anchors a coordinate apart"),
    ("if («aligned») { Vec<T, 4> vector;", "true", "vectors of misaligned anchors"),
    ("row_or_last = «here ? row() : tb.rows - 1»;", "row()", "anchors past the last one"),
    ("tb.anchor((«tb.own ? image * tb.rows : 0») +", "0", "the first image's anchors"),
    ("__all_sync(~0u, «is_regular_anchor(anchor)»)", "true", "anchors without area are culled"),
    ("j < 2 ? «fminf(bounds.v[j], other)» :", "bounds.v[j]", "bounds of one lane's low corner"),
    ("«fmaxf(bounds.v[j], other)»;", "bounds.v[j]", "bounds of one lane's high corner"),
    ("&& «bounds.v[2] > box.v[0]» &&", "bounds.v[2] > box.v[2]", "boxes across the right bound"),
    ("&& «bounds.v[3] > box.v[1]»;", "bounds.v[3] > box.v[3]", "boxes across the lower bound"),
    ("unit.here = «unit.row() < tb.rows»;", "unit.row() <= tb.rows", "one anchor too many"),
    ("if («takes_over(other, iou)») {", "other > iou", "NaN takes nothing over"),
    ("return «taken == kNone ? first : taken»;", "taken", "no first box where all IoUs are 0"),
    ("wanted = valid && («!unit.regular» ||", "false", "irregular anchors' pairs dropped"),
    ("|| «!is_regular_box(matching_area(box))» ||", "false", "irregular boxes' pairs dropped"),
    ("if («best.first == kNone» && any)", "true", "the first box of the last 32"),
    ("unit.area, «unit.regular && is_regular_box(area)»);", "true", "no IoU of 0 / 0"),
    ("key_of(kNanRank, kNone) : «key_of(0, 0)»;", "key_of(0, 1)", "a box without overlap: not the first anchor"),
    ("tb.keys[i] = «is_padding(box)» ?", "false", "padding has all anchors for its best"),
    ("images.count = «left < tb.images_per_warp» ?", "false", "images past the last"),
    ("if («place == chunk + unit.lane») key", "true", "a key for the wrong box"),
    ("key_of(top, unit.first + «__ffs(holders)» - 1)", "1", "the unit's first anchor as the best"),
    ("if («key_rank(key) > 0») {", "key_rank(key) > 0x3f000000", "maxima below 0.5 dropped"),
    ("may_hold |= «key_rank(before) <= key_rank(key)»;", "key_rank(before) < key_rank(key)", "ties between units"),
    ("«none» ? kUnmatched", "false", "an image without boxes has one"),
    ("contends |= __any_sync(~0u, may_hold) ? «1u << n» : 0;", "1u", "only the first image is looked at again"),
    ("__any_sync(~0u, «key_rank(key) == 0»)", "false", "boxes that no anchor overlaps"),
    ("__shfl_sync(~0u, at, owner) == unit.lane) «forced = chunk + owner;»", "forced = owner;", "boxes past 32"),
    (
        "restored |= «iou == key_iou(tb.keys[boxes + place])»;",
        "iou >= key_iou(tb.keys[boxes + place]) / 2",
        "other anchors restored",
    ),
    ("restored = «all»;", "false", "not all anchors of such an image"),
    ("const u32 index = «forced == kNone ? best.box() : forced»;", "best.box()", "a forced anchor keeps its own box"),
)
_FOVEA = (
    ("«blockIdx.x >= tb.level[l + 1].tile0»", "blockIdx.x > tb.level[l + 1].tile0", "level off by a tile"),
    ("&& «first_row <= out.bottom»;", "first_row < out.bottom", "the last row of a box"),
    ("counts[warp] = __popc(collected); «__syncthreads();»", ";", "no barrier before the counts are read"),
    ("if (has_cells) list[at] = box; «__syncthreads();»", ";", "the list read before it is written"),
    ("at += «i < warp ? counts[i] : 0»;", "0", "list places off by a warp"),
    ("«column <= other.right»", "column < other.right", "a box's last column"),
    ("«other.top <= row»", "true", "rows above a box"),
    ("inside && «takes_cell(other.area, area)»", "other.area < area", "the first of equal boxes"),
    ("image * tb.cells_per_image + «level.first_cell» +", "0", "levels over each other"),
    ("if («cell < cells») {", "true", "cells past the last one"),
)
_MATCHING_PLANS = (
    ("tb.low = static_cast<float>(«low»);", "high", "no anchor between the thresholds"),
    ("level.tile0 = static_cast<u32>(«tiles»);", "0", "every tile is the last level's"),
    ("tb.from = static_cast<float>(«1 - sigma»);", "sigma", "another shrunk box"),
    ("«truth.counts + gt_boxes.size()»", "truth.counts + 1", "as many boxes as the first image"),
)
_PLANS = (
    ("(«aligned ? 0 : vector - 1»), kGroupVectors", "0", "no group for the end of a run that starts within a vector"),
    ("tb.tiles += level.tiles * «images»;", "1", "tiles of the first image only"),
    ("tb.groups += level.groups * «images»;", "1", "strips of the images over each other"),
    ("positive_tiles = «divide_up(tb.groups, tb.positive_groups)»;", "1", "strips past the first tile's"),
    ("blocks = 1 + («deltas» ?", "false", "positives keep zeros"),
    ("if («blockIdx.x == 0») return coefficients_block", "blockIdx.x <= 1", "marks of the first words missing"),
    ("if («blockIdx.x > mark_blocks») return zeros_tile", "blockIdx.x > mark_blocks + 1", "no first piece of zeros"),
)
_LAUNCHERS = (
    ("return «loc.lambda != focal.eta || focal.eta == 0»", "loc.lambda != focal.eta", "0^0 of degenerate boxes"),
    ("«may_skip || zeros_.tiles > 0» ? DeltaTiles::kPositives", "true", "no zeros in the deltas' gradient"),
    ("(«source.level.planes ? planes : rows») = true;", "rows", "planes as rows"),
)
_FILES = {
    "cuda/focal.cuh": _FOCAL,
    "cuda/focal_fill.cu": _PLANS,
    "cuda/detection.cu": _LAUNCHERS,
    "cuda/positives.cuh": _POSITIVES,
    "cuda/coefficients.cuh": _COEFFICIENTS,
    "cuda/device.cuh": _DEVICE,
    "cuda/tables.cuh": _TABLES,
    "cuda/detection.cuh": _DETECTION,
    "cuda/focal_exact.cuh": _EXACT,
    "cuda/focal_dense.cuh": _DENSE,
    "cuda/strips.cuh": _STRIPS,
    "cuda/focal_math.cuh": _MATH,
    "cuda/focal_fill.cuh": _FILL,
    "cuda/cross_entropy.cuh": _SOFTMAX,
    "cuda/smooth_l1.cuh": _SMOOTH_L1,
    "cuda/boxes.cuh": _BOXES,
    "cuda/rescale.cuh": _RESCALE,
    "cuda/matching.cuh": _MATCHING,
    "cuda/fovea.cuh": _FOVEA,
    "cuda/matching.cu": _MATCHING_PLANS,
}
TABLE = [Mutant(file, *line) for file, lines in _FILES.items() for line in lines]


def _place(text: str, mutant: Mutant) -> tuple[int, int]:
    """Where the replaced text lies."""
    before, old, after = re.split("[«»]", mutant.context)
    parts = (r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in (before, old, after))
    found = list(re.finditer("{}({}){}".format(*parts), text))
    if len(found) != 1:
        raise ValueError(f"{mutant.file}: {len(found)} places for the mutant {mutant.context!r} ({mutant.why})")
    return found[0].span(1)


def _schema(old: str, number: int, new: str) -> str:
    chosen = f"simt::mutant == {number}"
    if old.endswith(";"):
        return f"{{ if ({chosen}) {{ {new} }} else {{ {old} }} }}"
    return f"({chosen} ? ({new}) : ({old}))"


def write_sources(target: Path) -> None:
    """A copy of csrc with all mutants in it, each behind its number in TABLE, from 1."""
    for folder in emulation.FOLDERS:
        shutil.copytree(emulation.CSRC / folder, target / folder)
    for file in _FILES:
        text = (emulation.CSRC / file).read_text(encoding="utf-8")
        places = [(*_place(text, m), number, m) for number, m in enumerate(TABLE, 1) if m.file == file]
        places.sort(reverse=True)
        end_of_last = len(text)
        for first, last, number, mutant in places:
            if last > end_of_last:
                raise ValueError(f"{file}: two mutants overlap, one is {mutant.context!r}")
            text = text[:first] + _schema(text[first:last], number, mutant.new) + text[last:]
            end_of_last = first
        (target / file).write_text(text, encoding="utf-8")
