// One instruction set's kernels, gathered in a table. Compiled once per instruction set, like the kernels.
#include "kernels.h"

#define SAM_STRING_(x) #x
#define SAM_STRING(x) SAM_STRING_(x)
#define SAM_CONCAT_(a, b) a##b
#define SAM_CONCAT(a, b) SAM_CONCAT_(a, b)

namespace sam {
inline namespace SAM_ISA {
void grad_norm(const Bucket&, const Group*, double*, int);
int64_t perturb(const Bucket&, const Group*, const double*, int64_t, double, double*, Rounding, int);
void backup(const Bucket&, int);
void restore(const Bucket&, bool, int);
template <class Step>
int64_t step(const Bucket&, const void*, double, Rounding, int);
}  // namespace SAM_ISA

#define SAM_STEP_OF(name, Step) step<Step>,
extern const Kernels SAM_CONCAT(kernels_, SAM_ISA);
const Kernels SAM_CONCAT(kernels_, SAM_ISA) = {SAM_STRING(SAM_ISA),     grad_norm, perturb, backup, restore,
                                               {SAM_STEPS(SAM_STEP_OF)}};

}  // namespace sam
