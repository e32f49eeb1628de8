// One instruction set's kernels, gathered in a table. Compiled once per instruction set, like the kernels.
#include "kernels.h"

#define SAM_STRING_(x) #x
#define SAM_STRING(x) SAM_STRING_(x)
#define SAM_CONCAT_(a, b) a##b
#define SAM_CONCAT(a, b) SAM_CONCAT_(a, b)

namespace sam {
inline namespace SAM_ISA {
void grad_norm(const GradNormArgs&);
int64_t perturb(const PerturbArgs&);
void backup(const CopyArgs&);
void restore(const CopyArgs&);
int64_t restore_sgd(const RestoreSgdArgs&);
int64_t restore_adam(const RestoreAdamArgs&);
}  // namespace SAM_ISA

extern const Kernels SAM_CONCAT(kernels_, SAM_ISA);
const Kernels SAM_CONCAT(kernels_, SAM_ISA) = {SAM_STRING(SAM_ISA), grad_norm, perturb, backup, restore,
                                               restore_sgd, restore_adam};

}  // namespace sam
