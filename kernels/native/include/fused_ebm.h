/* fused-ebm in C: anomaly energies of collider events, and their score vectors, from a packed model file.
 *
 *     python -m kernels pack models/demo demo.febm         writes the file, once
 *
 *     fused_ebm_model *model;
 *     if (fused_ebm_open("demo.febm", &model)) fail(fused_ebm_last_error());
 *     int code = fused_ebm_score(model, x, n, fused_ebm_default_level(model), energy, NULL, flag, 1);
 *     fused_ebm_close(model);
 *
 * Events are raw: float32 in the units of the model's features, in their order (fused_ebm_feature), row-major (n, D)
 * without gaps, at any address a float may have. Preprocessing belongs to the model. NaN, or the marker that the model
 * was trained with, is a missing value where the feature has an imputation.
 *
 * The energy E is the anomaly score: high = unusual. The score s = -dE/dx, (n, D) in inverse units of x, points
 * towards more normal events. The energies of different noise levels carry free constants: standardise each on
 * background before comparing them.
 *
 * Results have the bits of the Python backend "native" on the same instruction set. They depend neither on `threads`
 * nor on an event's place in its batch; a batch of a few events sums in another order than a large one, unless the
 * model is set to be deterministic.
 *
 * Threads: any number of threads may call on one model at once. Only fused_ebm_close and fused_ebm_set_deterministic
 * need the model to themselves. `threads` bounds how many a call works on, the caller's among them: small batches stay
 * on the caller's thread, the others share the library's threads, which sleep between calls. After fork the child may
 * go on calling.
 *
 * Errors: a function that returns int gives FUSED_EBM_OK (0) or one of the codes below, and fused_ebm_last_error()
 * says in one sentence what was given and what was expected. Nothing is written after FUSED_EBM_BAD_ARGUMENT.
 */
#ifndef FUSED_EBM_H
#define FUSED_EBM_H

#include <stdint.h>

#if defined(__GNUC__)
#define FUSED_EBM_API __attribute__((visibility("default")))
#else
#define FUSED_EBM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  FUSED_EBM_OK = 0,
  FUSED_EBM_BAD_ARGUMENT = 1, /* NULL, a negative n, a noise level or number of threads out of range */
  FUSED_EBM_CANNOT_READ = 2,  /* no such file, or it cannot be read */
  FUSED_EBM_BAD_FILE = 3,     /* not a packed model, or truncated or damaged */
  FUSED_EBM_NEWER_FILE = 4,   /* a packed model of a later format version */
  FUSED_EBM_NOT_FINITE = 5,   /* results are written, but some event's energy is NaN or infinite */
  FUSED_EBM_FAILED = 6        /* out of memory or threads; FUSED_EBM_ISA names what this processor cannot run */
};

typedef struct fused_ebm_model fused_ebm_model;

/* "0.1.0". */
FUSED_EBM_API const char *fused_ebm_version(void);

/* What was wrong at this thread's last call that failed; "" before one. Valid until this thread's next failure. */
FUSED_EBM_API const char *fused_ebm_last_error(void);

/* Opens a packed model; *model is NULL on an error. The file is read, checked (SHA-256) and closed. The kernels are of
 * the best instruction set of this processor, or of FUSED_EBM_ISA=avx512|avx2|generic in the environment. */
FUSED_EBM_API int fused_ebm_open(const char *path, fused_ebm_model **model);

/* Frees a model; NULL is allowed. */
FUSED_EBM_API void fused_ebm_close(fused_ebm_model *model);

/* With on != 0 all batch sizes take one path, so that an event has the same bits alone and in any batch; a batch of a
 * few events then takes longer. Off at first. */
FUSED_EBM_API int fused_ebm_set_deterministic(fused_ebm_model *model, int on);

/* D, the number of noise levels L, and the level that the model was calibrated at; -1 for NULL. */
FUSED_EBM_API int32_t fused_ebm_n_features(const fused_ebm_model *model);
FUSED_EBM_API int32_t fused_ebm_n_levels(const fused_ebm_model *model);
FUSED_EBM_API int32_t fused_ebm_default_level(const fused_ebm_model *model);

/* flag = energy > threshold, strictly, at the default level. NaN where the model has none, and for NULL. */
FUSED_EBM_API float fused_ebm_threshold(const fused_ebm_model *model);

/* Name of feature j, UTF-8; NULL where there is none. These strings live as long as the model. */
FUSED_EBM_API const char *fused_ebm_feature(const fused_ebm_model *model, int32_t j);

/* Instruction set in use: "avx512", "avx2" or "generic"; NULL for NULL. */
FUSED_EBM_API const char *fused_ebm_isa(const fused_ebm_model *model);

/* Digest of the trained model, 64 hexadecimal digits, as Bundle.digest in Python; NULL for NULL. */
FUSED_EBM_API const char *fused_ebm_digest(const fused_ebm_model *model);

/* Energies (n), and where the pointers are not NULL the scores (n, D) and the flags (n): 1 where energy > threshold,
 * else 0. Flags need a model with a threshold, and its default level. `level` is 0 to L - 1, `threads` at least 1.
 *
 * FUSED_EBM_NOT_FINITE names the first event whose energy is not finite: Inf, or NaN in a feature without imputation,
 * gives NaN or Inf for that event alone; the flag of a NaN is 0. */
FUSED_EBM_API int fused_ebm_score(const fused_ebm_model *model, const float *x, int64_t n, int32_t level,
                                  float *energy, float *score, uint8_t *flag, int threads);

/* The same with a noise level for each event, levels (n); without flags, since the threshold is of one level. */
FUSED_EBM_API int fused_ebm_score_levels(const fused_ebm_model *model, const float *x, int64_t n,
                                         const int32_t *levels, float *energy, float *score, int threads);

/* Energies (n, L) at every noise level in one pass. */
FUSED_EBM_API int fused_ebm_energies(const fused_ebm_model *model, const float *x, int64_t n, float *energies,
                                     int threads);

#ifdef __cplusplus
}
#endif

#endif
