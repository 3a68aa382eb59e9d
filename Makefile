# make          builds osp, after saying what was found here and what was left out
# make demo     a clip from your sentence        make test    all checks          make verify  the paper's claims
# make bench    time of every part               make mutate  proves that the tests can fail
# make figures  the README's pictures             make grpo-tiny, what-if  the README's experiments
# make sanitize tests and bad input under AddressSanitizer and UBSan              make fuzz    the file reader
# make torture  kills, full disks, hostile files: at most 20 minutes on two cores
# make osp_mpi, make osp_cuda                    other builds, where mpicc and nvcc work
# OMP=0 leaves OpenMP out; CC=clang, NATIVE=0 (no -march=native), GOLDEN=dir, ARCH="80 90a" (the cards of osp_cuda),
# MPI=1 (osp_cuda with ranks); after a change of these: make -B

CC     ?= cc
NATIVE ?= 1
OMP    ?= 1
GOLDEN ?= golden
# threads sleep at barriers: much faster where other programs run, too
export OMP_WAIT_POLICY ?= passive
FUZZ   ?= 1000000
CFLAGS ?= -O3
WARN    = -Wall -Wextra
# Every probe compiles a few lines: what compiles is there, wherever it is installed.
probe   = $(shell printf '%s\n' '$(2)' | $(1) -x c - -o /dev/null 2>/dev/null && echo yes)
HAS_OMP := $(if $(filter 1,$(OMP)),$(call probe,$(CC) -fopenmp,int main(void) { return 0; }))
HAS_STB := $(shell printf '\043if __has_include(<stb/stb_image_write.h>)\n\043include <stb/stb_image_write.h>\n\043else\n\043include <stb_image_write.h>\n\043endif\nint main(void) { return 0; }\n' | $(CC) -x c - -o /dev/null 2>/dev/null && echo yes)
HAS_MPI := $(call probe,mpicc,int main(void) { return 0; })
HAS_NVCC := $(shell nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p' | awk '$$1 * 100 + $$2 >= 1205 { print "yes" }')
FLAGS    = -std=gnu11 $(CFLAGS) -fno-math-errno $(if $(filter 1,$(NATIVE)),-march=native) $(if $(HAS_OMP),-fopenmp,-Wno-unknown-pragmas) $(WARN)
LIBS     = -lm -ldl

.PHONY: all report demo train-tiny grpo-tiny figures what-if torture test verify bench mutate sanitize sanitize_mpi fuzz test_mpi test_cuda test-weights clean
all: report osp

report:
	@echo "$(if $(HAS_STB),✓ stb_image_write,✗ stb_image_write is missing and needed: apt-get install -y libstb-dev)"
	@echo "$(if $(HAS_OMP),✓ OpenMP,→ without OpenMP: one thread (gcc has it; for clang: apt-get install -y libomp-dev))"
	@echo "$(if $(HAS_MPI),✓ MPI: make osp_mpi,→ without MPI: no ranks (apt-get install -y libopenmpi-dev openmpi-bin))"
	@echo "$(if $(HAS_NVCC),✓ nvcc: make osp_cuda,→ without nvcc: no GPU program (install the CUDA Toolkit, 12.5 or newer))"

osp: osp.c
	$(CC) $(FLAGS) osp.c -o $@ $(LIBS)
test_osp: test_osp.c osp.c
	$(CC) $(FLAGS) test_osp.c -o $@ $(LIBS)
osp_mpi: osp.c
	OMPI_CC=$(CC) mpicc -DOSP_MPI $(FLAGS) osp.c -o $@ $(LIBS)
test_osp_mpi: test_osp.c osp.c
	OMPI_CC=$(CC) mpicc -DOSP_MPI $(FLAGS) test_osp.c -o $@ $(LIBS)

# ---- GPU: machine code for the card found, or for those in ARCH (80, 86, 89, 90a, 120, ..; sm_90a means 90a), or for
# 80 and 90a where there is neither; and PTX, which any other card from 8.0 on compiles when the program first starts
ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2/p' | sort -u)
CARDS   = $(patsubst 90,90a,$(patsubst sm_%,%,$(or $(strip $(ARCH)),80 90a)))
NVFLAGS = -std=c++17 -O3 $(foreach c,$(CARDS),-gencode=arch=compute_$(c),code=sm_$(c)) -gencode=arch=compute_80,code=compute_80 \
          -Xcompiler -fopenmp,-Wall,-Wextra $(if $(filter 1,$(NATIVE)),-Xcompiler -march=native) \
          $(if $(MPI),-DOSP_MPI -DOMPI_SKIP_MPICXX $(filter -I%,$(shell mpicc --showme:compile)))
HAS_NCCL := $(if $(MPI),$(shell printf '\043include <nccl.h>\nint main(void) { return 0; }\n' | nvcc -x cu - -lnccl -o /dev/null 2>/dev/null && echo yes))
NVLIBS   = -lcublasLt $(if $(HAS_NCCL),-lnccl) $(if $(MPI),$(filter -L% -l%,$(shell mpicc --showme:link)))
osp_cuda: osp_cuda.cu osp.c
	nvcc $(NVFLAGS) $(if $(HAS_NCCL),-DOSP_NCCL) osp_cuda.cu -o $@ $(NVLIBS)
test_osp_cuda: test_osp.c osp_cuda.cu osp.c
	nvcc $(NVFLAGS) $(if $(HAS_NCCL),-DOSP_NCCL) -x cu -DTEST_CUDA test_osp.c -o $@ $(NVLIBS)

# ---- the demo: captions that training never saw, drawn by the shipped model. train-tiny: from nothing, in three minutes
# on two cores; killed and run again, it resumes
PROMPTS = "a large red circle moving left on a gray background" "a small green diamond moving up on a navy background" \
          "a large yellow triangle moving right on a black background"
demo: report osp
	./osp sample -w assets/toy.safetensors $(PROMPTS) -n 12 -o out.png
	@echo "open out.png in a browser (it moves), out_sheet.png anywhere"
tiny.safetensors: | osp
	./osp train --preset tiny -o $@
train-tiny: report osp tiny.safetensors
	./osp sample -w tiny.safetensors $(PROMPTS) -g 2 --seed 2 -o out.png
	@echo "open out.png in a browser (it moves), out_sheet.png anywhere"

# ---- the shipped toy, as the paper makes its model: full attention, small frames first; hybrid; HiF8; GRPO (8 minutes on
# an H100 with OSP=./osp_cuda; days on a CPU). Then the miniature of the paper's tables.
OSP ?= ./osp_cuda
TOY ?= .
EVAL = $(OSP) eval -n 256 --batch 64 --json
train-toy: $(OSP)
	$(OSP) train --preset toy --full --height 16 --width 16 --batch 128 --steps 3000 -o $(TOY)/toy_16.safetensors >$(TOY)/toy_16.log
	$(EVAL) -w $(TOY)/toy_16.safetensors
	$(OSP) train --preset toy --init $(TOY)/toy_16.safetensors --height 32 --width 32 --steps 2500 --lr 1e-3 -o $(TOY)/toy_full.safetensors >$(TOY)/toy_full.log
	$(EVAL) -w $(TOY)/toy_full.safetensors
	$(OSP) train --preset toy --init $(TOY)/toy_full.safetensors --full-blocks 4 --steps 1500 --lr 5e-4 -o $(TOY)/toy_hybrid.safetensors >$(TOY)/toy_hybrid.log
	$(EVAL) -w $(TOY)/toy_hybrid.safetensors
	$(OSP) train --preset toy --init $(TOY)/toy_hybrid.safetensors --hif8 --dtype hif8 --steps 800 --lr 2e-4 -o $(TOY)/toy.safetensors >$(TOY)/toy.log
	$(EVAL) -w $(TOY)/toy.safetensors

# ---- reinforcement learning with room to gain: tiny on two cores (a base of a minute, then four); a young toy on a GPU
SEED ?= 1
grpo-tiny: report osp
	./osp train --preset tiny --steps 700 --warmup 50 -o tiny_700.safetensors
	./osp grpo --init tiny_700.safetensors --seed $(SEED) --eval 10 -o tiny_lora.safetensors | tee tiny_grpo.log
	./osp eval -w tiny_700.safetensors -n 192 --batch 32 --steps 12 --soft
	./osp eval -w tiny_700.safetensors --lora tiny_lora.safetensors -n 192 --batch 32 --steps 12 --soft
grpo-toy: $(OSP)
	$(OSP) train --preset toy --full --height 16 --width 16 --batch 128 --steps 450 -o $(TOY)/toy_450.safetensors >$(TOY)/toy_450.log
	$(OSP) grpo --init $(TOY)/toy_450.safetensors --seed $(SEED) --steps 60 --micro 4 -o $(TOY)/toy_lora.safetensors >$(TOY)/toy_grpo.log
	$(EVAL) -w $(TOY)/toy_450.safetensors
	$(EVAL) -w $(TOY)/toy_450.safetensors --lora $(TOY)/toy_lora.safetensors

# ---- the README's pictures, from files in the repository. float.log: osp train --preset tiny --steps 600; the other two:
# --steps 300, then --init and --seed 2 for 300 more, in float32 or with --hif8, their steps counted on. bench_*.log:
# test_osp_cuda bench --shape 14b-768p [--hif8] --layers 0
figures: test_osp
	./test_osp show skiparse -o assets/skiparse.svg
	./test_osp show ranks -R 4 -o assets/ranks.svg
	./test_osp show hif8 -o assets/hif8.svg
	./test_osp show gradients assets/toy.safetensors -o assets/gradients.svg
	./test_osp show cost assets/bench_768p_bf16.log assets/bench_768p_hif8.log -o assets/cost.svg
	./test_osp show flow -o assets/flow.svg
	./test_osp show grpo -o assets/grpo.svg
	./test_osp show reward assets/grpo_seed1.log assets/grpo_seed2.log assets/grpo_seed3.log -o assets/reward.svg
	./test_osp show reward assets/grpo_red.log -o assets/red.svg
	./test_osp show loss assets/float.log assets/float_float.log assets/float_hif8.log -o assets/loss.svg

# ---- what if all sparse blocks were of one kind? tiny, equal steps (15 minutes a seed on two cores); a name's digit: how
# many of the 8 blocks are full. float4, hif84: 300 steps more from both4
KINDS = "full8 --full" "both4" "token4 --sparse token" "group4 --sparse group" "both0 --full-blocks 0" \
        "token0 --sparse token --full-blocks 0" "group0 --sparse group --full-blocks 0" "float4 $(MORE)" "hif84 --hif8 $(MORE)"
MORE = --init what_if_both4_$(SEED).safetensors --seed 9 --steps 300 --lr 1e-3 --warmup 20
what-if: osp
	@for kind in $(KINDS); do set -- $$kind; name=what_if_$$1_$(SEED).safetensors; shift; echo "== $$name"; \
	 ./osp train --preset tiny --seed $(SEED) "$$@" -o $$name >$${name%.safetensors}.log && \
	 ./osp eval -w $$name -n 256 --batch 32 | grep -e total -e all || exit 1; done

# ---- proof
test: osp test_osp
	./test_osp --golden $(GOLDEN)
	./test_osp badinput ./osp
	@python3 -c 'import numpy, safetensors' 2>/dev/null && python3 weights_export.py test --osp ./osp --golden $(GOLDEN) \
	 || { python3 -c 'import numpy, safetensors' 2>/dev/null && exit 1 || echo "weights_export.py: skipped (pip install numpy safetensors)"; }
verify: test_osp
	./test_osp verify --golden $(GOLDEN)
bench: test_osp
	./test_osp bench
mutate: test_osp
	CC="$(CC)" ./test_osp mutate --golden $(GOLDEN)
# R ranks against one: 2 and 4 share a sample, 8 are two guidance halves of 4; then a rank that dies must end the others
RANKS = mpirun --oversubscribe -q -np
test_mpi: test_osp_mpi
	for R in 1 2 4 8; do OMP_NUM_THREADS=1 $(RANKS) $$R ./test_osp_mpi ranks || exit 1; done
	OMP_NUM_THREADS=1 $(RANKS) 4 ./test_osp_mpi verify --golden $(GOLDEN)
	timeout 10 $(RANKS) 2 ./test_osp_mpi lose; rc=$$?; test $$rc -ne 0 -a $$rc -ne 124 && echo "a dead rank ended the others: 1 passed, 0 failed"
test_cuda: test_osp_cuda
	./test_osp_cuda --golden $(GOLDEN)
	./test_osp_cuda --golden $(GOLDEN) --device-dtype bf16
# needs about 6 GB: torch, transformers and diffusers in a virtual environment
test-weights: osp
	@echo "this installs torch, transformers and diffusers (about 6 GB) into .venv"
	python3 -m venv .venv && .venv/bin/pip install -q numpy safetensors ftfy torch transformers diffusers sentencepiece imageio-ffmpeg
	.venv/bin/python weights_export.py test --all --osp ./osp --golden $(GOLDEN)
SAN = -std=gnu11 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer $(if $(HAS_OMP),-fopenmp) $(WARN)
sanitize_mpi:
	OMPI_CC=$(CC) mpicc -DOSP_MPI $(SAN) test_osp.c -o test_osp_mpi_san $(LIBS)
	for R in 2 4 8; do OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 $(RANKS) $$R ./test_osp_mpi_san ranks small || exit 1; done
sanitize:
	$(CC) $(SAN) osp.c -o osp_san $(LIBS)
	$(CC) $(SAN) test_osp.c -o test_osp_san $(LIBS)
	ASAN_OPTIONS=detect_leaks=0 ./test_osp_san --golden $(GOLDEN)
	ASAN_OPTIONS=detect_leaks=0 ./test_osp_san badinput ./osp_san
fuzz:
	$(CC) $(SAN) test_osp.c -o test_osp_san $(LIBS)
	ASAN_OPTIONS=detect_leaks=0 ./test_osp_san fuzz $(FUZZ)
# killed runs, full disks, hostile files: at most 20 minutes on two cores
torture: osp test_osp
	./test_osp torture ./osp
clean:
	rm -f test_osp_mpi_san osp osp_mpi osp_cuda test_osp test_osp_mpi test_osp_cuda osp_san test_osp_san
