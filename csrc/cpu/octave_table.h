// The focal loss of bfloat16 logits below zero by their octave. Such a logit has 128 values between two powers of two,
// so that one permutation of bytes (AVX-512 VBMI) looks up one byte of the results of 64 logits.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/table_values.h"

namespace ioubal {

constexpr int kOctaves = 5;                            // from -0.5 to -16
constexpr uint16_t kFirstOctave = 0xbf00;              // the bits of -0.5
constexpr uint16_t kLeastDirect = 0x3a80;              // of 2^-10
constexpr int kDirect = 14 * 128;                      // values from there to 16
constexpr int kGradLow = 0, kGradHigh = 1, kLoss = 2;  // planes; the loss has four, its lowest byte first
constexpr int kPlanes = kLoss + 4;

struct OctaveTable {
  // What is written, a bfloat16, and the loss, a float32, a byte in each plane.
  alignas(64) uint8_t planes[kOctaves][kPlanes][128];
  // The same of every logit from 2^-10 to 16 in size, by sign: the few that lie in no octave are read one by one.
  struct Entry {
    float loss;
    uint16_t written;
  } direct[2][kDirect];

  // Its entries are what these kernels give: what is written is the same, to the last bit.
  OctaveTable(const FocalDense (&focal)[4], double scale, double gamma, Output output) {
    alignas(64) uint16_t bits[kDirect], written[kDirect] = {};
    alignas(64) float x[kDirect], loss[kDirect];
    for (int sign = 0; sign < 2; ++sign) {
      for (int i = 0; i < kDirect; ++i) {
        bits[i] = static_cast<uint16_t>(sign << 15 | (kLeastDirect + i));
        const uint32_t wide = uint32_t{bits[i]} << 16;
        std::memcpy(&x[i], &wide, 4);
      }
      values_of(focal, kBFloat16, bits, x, kDirect, scale, gamma, output, loss, written);
      for (int i = 0; i < kDirect; ++i) direct[sign][i] = {loss[i], written[i]};
    }
    const Entry* first = direct[1] + (kFirstOctave & 0x7fff) - kLeastDirect;
    for (int i = 0; i < 128 * kOctaves; ++i) {
      uint8_t (&octave)[kPlanes][128] = planes[i / 128];
      uint32_t loss_bits;
      std::memcpy(&loss_bits, &first[i].loss, 4);
      octave[kGradLow][i % 128] = static_cast<uint8_t>(first[i].written);
      octave[kGradHigh][i % 128] = static_cast<uint8_t>(first[i].written >> 8);
      for (int j = 0; j < 4; ++j) octave[kLoss + j][i % 128] = static_cast<uint8_t>(loss_bits >> 8 * j);
    }
  }
};

}  // namespace ioubal
