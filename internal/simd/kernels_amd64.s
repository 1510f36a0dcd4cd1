#include "go_asm.h"
#include "textflag.h"

// A type's LOAD macro turns 8 elements at AT into floats in Y, whose lower half is X. It may use Y12, and
// constants that the type's SETUP leaves in Y13 to Y15.

#define NO_SETUP

#define LOAD_F32(AT, X, Y) \
	VMOVUPS AT, Y

#define LOAD_F16(AT, X, Y) \
	VCVTPH2PS AT, Y

#define LOAD_BF16(AT, X, Y) \
	VPMOVZXWD AT, Y \
	VPSLLD    $16, Y, Y

// Moved to where fp16 has its own, the bits of an fp8 number lack a factor of 2^8. Its NaN has all bits but
// the sign set, as fp16 may have, too.
#define SETUP_F8 \
	VMOVDQU fp8<>+0(SB), X13 \
	VMOVDQU fp8<>+16(SB), X14 \
	VMOVUPS fp8<>+32(SB), Y15

#define LOAD_F8(AT, X, Y) \
	VPMOVZXBW AT, X \
	VPSLLW    $8, X, X12 \
	VPAND     X14, X12, X12 \
	VPSLLW    $7, X, X \
	VPAND     X13, X, X \
	VPOR      X, X12, X12 \
	VPCMPEQW  X13, X, X \
	VPSRLW    $1, X, X \
	VPOR      X12, X, X \
	VCVTPH2PS X, Y \
	VMULPS    Y15, Y, Y

#define LOAD_U8(AT, X, Y) \
	VPMOVZXBD AT, Y \
	VCVTDQ2PS Y, Y

#define SETUP_U4 \
	VMOVDQU u4<>+0(SB), Y14 \
	VMOVDQU u4<>+32(SB), Y15

#define LOAD_U4(AT, X, Y) \
	VPBROADCASTD AT, Y \
	VPSRLVD   Y14, Y, Y \
	VPAND     Y15, Y, Y \
	VCVTDQ2PS Y, Y

#define SETUP_U2 \
	VMOVDQU u2<>+0(SB), Y14 \
	VMOVDQU u2<>+32(SB), Y15

#define LOAD_U2(AT, X, Y) \
	VPBROADCASTW AT, Y \
	VPSRLVD   Y14, Y, Y \
	VPAND     Y15, Y, Y \
	VCVTDQ2PS Y, Y

// A WIDE macro loads 16 elements.

#define LOAD_F32WIDE(AT, Z) \
	VMOVUPS AT, Z

#define LOAD_F16WIDE(AT, Z) \
	VCVTPH2PS AT, Z

#define LOAD_BF16WIDE(AT, Z) \
	VPMOVZXWD AT, Z \
	VPSLLD    $16, Z, Z

// Each double word gets the 4 bits that are its code, and others that the table of codes' values ignores.
#define SETUP_U4WIDE \
	VMOVDQU32 u4wide<>+0(SB), Z14 \
	VMOVDQU32 u4wide<>+64(SB), Z15

#define LOAD_U4WIDE(AT, Z) \
	VPMULTISHIFTQB.BCST AT, Z14, Z \
	VPERMPS             Z15, Z, Z

DATA fp8<>+0(SB)/8, $0x3f803f803f803f80
DATA fp8<>+8(SB)/8, $0x3f803f803f803f80
DATA fp8<>+16(SB)/8, $0x8000800080008000
DATA fp8<>+24(SB)/8, $0x8000800080008000
DATA fp8<>+32(SB)/8, $0x4380000043800000
DATA fp8<>+40(SB)/8, $0x4380000043800000
DATA fp8<>+48(SB)/8, $0x4380000043800000
DATA fp8<>+56(SB)/8, $0x4380000043800000
GLOBL fp8<>(SB), RODATA|NOPTR, $64

// How far to shift for each of 8 codes, and the bits of one.
DATA u4<>+0(SB)/8, $0x0000000400000000
DATA u4<>+8(SB)/8, $0x0000000c00000008
DATA u4<>+16(SB)/8, $0x0000001400000010
DATA u4<>+24(SB)/8, $0x0000001c00000018
DATA u4<>+32(SB)/8, $0x0000000f0000000f
DATA u4<>+40(SB)/8, $0x0000000f0000000f
DATA u4<>+48(SB)/8, $0x0000000f0000000f
DATA u4<>+56(SB)/8, $0x0000000f0000000f
GLOBL u4<>(SB), RODATA|NOPTR, $64

DATA u2<>+0(SB)/8, $0x0000000200000000
DATA u2<>+8(SB)/8, $0x0000000600000004
DATA u2<>+16(SB)/8, $0x0000000a00000008
DATA u2<>+24(SB)/8, $0x0000000e0000000c
DATA u2<>+32(SB)/8, $0x0000000300000003
DATA u2<>+40(SB)/8, $0x0000000300000003
DATA u2<>+48(SB)/8, $0x0000000300000003
DATA u2<>+56(SB)/8, $0x0000000300000003
GLOBL u2<>(SB), RODATA|NOPTR, $64

// Where in a quad word the codes start, and the values of codes.
DATA u4wide<>+0(SB)/8, $0x0000000400000000
DATA u4wide<>+8(SB)/8, $0x0000000c00000008
DATA u4wide<>+16(SB)/8, $0x0000001400000010
DATA u4wide<>+24(SB)/8, $0x0000001c00000018
DATA u4wide<>+32(SB)/8, $0x0000002400000020
DATA u4wide<>+40(SB)/8, $0x0000002c00000028
DATA u4wide<>+48(SB)/8, $0x0000003400000030
DATA u4wide<>+56(SB)/8, $0x0000003c00000038
DATA u4wide<>+64(SB)/8, $0x3f80000000000000
DATA u4wide<>+72(SB)/8, $0x4040000040000000
DATA u4wide<>+80(SB)/8, $0x40a0000040800000
DATA u4wide<>+88(SB)/8, $0x40e0000040c00000
DATA u4wide<>+96(SB)/8, $0x4110000041000000
DATA u4wide<>+104(SB)/8, $0x4130000041200000
DATA u4wide<>+112(SB)/8, $0x4150000041400000
DATA u4wide<>+120(SB)/8, $0x4170000041600000
GLOBL u4wide<>(SB), RODATA|NOPTR, $128

// Each element of 4, 4 times; the even ones of 8, and the odd ones.
DATA quarters<>+0(SB)/8, $0x0000000000000000
DATA quarters<>+8(SB)/8, $0x0000000000000000
DATA quarters<>+16(SB)/8, $0x0000000100000001
DATA quarters<>+24(SB)/8, $0x0000000100000001
DATA quarters<>+32(SB)/8, $0x0000000200000002
DATA quarters<>+40(SB)/8, $0x0000000200000002
DATA quarters<>+48(SB)/8, $0x0000000300000003
DATA quarters<>+56(SB)/8, $0x0000000300000003
GLOBL quarters<>(SB), RODATA|NOPTR, $64

DATA pairs<>+0(SB)/8, $0x0000000200000000
DATA pairs<>+8(SB)/8, $0x0000000600000004
DATA pairs<>+16(SB)/8, $0x0000000200000000
DATA pairs<>+24(SB)/8, $0x0000000600000004
DATA pairs<>+32(SB)/8, $0x0000000200000000
DATA pairs<>+40(SB)/8, $0x0000000600000004
DATA pairs<>+48(SB)/8, $0x0000000200000000
DATA pairs<>+56(SB)/8, $0x0000000600000004
DATA pairs<>+64(SB)/8, $0x0000000300000001
DATA pairs<>+72(SB)/8, $0x0000000700000005
DATA pairs<>+80(SB)/8, $0x0000000300000001
DATA pairs<>+88(SB)/8, $0x0000000700000005
DATA pairs<>+96(SB)/8, $0x0000000300000001
DATA pairs<>+104(SB)/8, $0x0000000700000005
DATA pairs<>+112(SB)/8, $0x0000000300000001
DATA pairs<>+120(SB)/8, $0x0000000700000005
GLOBL pairs<>(SB), RODATA|NOPTR, $128

// While a vector is worked on, another one NEAR behind it in the list is asked of memory, and the first line
// of one FAR behind: its page may be new to the processor, which has to look up where it is, and then goes
// ahead by itself. Both go to the second cache, as vectors of one head may compete for few places in the
// first. These macros use R14 and want AX to point to args, R12 into the list.
#define HEADER 24
#define NEAR (32*HEADER)
#define FAR (48*HEADER)

#define FETCH_FAR(HEADERS) \
	LEAQ       (FAR+HEADERS)(R12), R14 \
	CMPQ       R14, args_last(AX) \
	CMOVQHI    args_last(AX), R14 \
	MOVQ       (R14), R14 \
	PREFETCHT2 (R14)

#define FIND_NEAR(HEADERS, TO) \
	LEAQ    (NEAR+HEADERS)(R12), TO \
	CMPQ    TO, args_last(AX) \
	CMOVQHI args_last(AX), TO \
	MOVQ    (TO), TO

// NEXT1 points SI to the next vector, and R14 to the one that FETCH asks for.
#define NEXT1 \
	FETCH_FAR(0) \
	FIND_NEAR(0, R14) \
	MOVQ       (R12), SI \
	ADDQ       $HEADER, R12

// FETCH asks for the next bytes of the vector at R14, up to a line; FETCH_LINES for two. All of it at once would
// stop the arithmetic.
#define FETCH(BYTES) \
	PREFETCHT1 (R14) \
	ADDQ       $(BYTES), R14

#define FETCH_LINES(BYTES) \
	PREFETCHT1 (R14) \
	PREFETCHT1 ((BYTES)-64)(R14) \
	ADDQ       $(BYTES), R14

#define NO_FETCH(BYTES)

// NEXT4 points SI, CX, DX and R14 to the next 4 vectors, and R8 to R11 to those that FETCH4 asks for, of which
// it takes a line each where AX, the place in the vectors, begins one.
#define NEXT4 \
	FETCH_FAR(0*HEADER) \
	FETCH_FAR(1*HEADER) \
	FETCH_FAR(2*HEADER) \
	FETCH_FAR(3*HEADER) \
	FIND_NEAR(0*HEADER, R8) \
	FIND_NEAR(1*HEADER, R9) \
	FIND_NEAR(2*HEADER, R10) \
	FIND_NEAR(3*HEADER, R11) \
	MOVQ (0*HEADER)(R12), SI \
	MOVQ (1*HEADER)(R12), CX \
	MOVQ (2*HEADER)(R12), DX \
	MOVQ (3*HEADER)(R12), R14 \
	ADDQ $(4*HEADER), R12

#define FETCH4 \
	TESTQ $63, AX \
	JNZ   fetched \
	PREFETCHT1 (R8)(AX*1) \
	PREFETCHT1 (R9)(AX*1) \
	PREFETCHT1 (R10)(AX*1) \
	PREFETCHT1 (R11)(AX*1) \
fetched:

// PRODUCTS4 multiplies the vector at SI, of CX lots, by the 4 queries at R8 to R11, and moves SI behind it. The
// products are in X0. Elements 0-7 and 8-15 of each 16 have sums of their own: 8 sums, as many as two
// multipliers have in flight. It uses AX.
#define PRODUCTS4(LOAD, BYTES, FETCH) \
	XORQ   AX, AX \
	VXORPS Y0, Y0, Y0 \
	VXORPS Y1, Y1, Y1 \
	VXORPS Y2, Y2, Y2 \
	VXORPS Y3, Y3, Y3 \
	VXORPS Y4, Y4, Y4 \
	VXORPS Y5, Y5, Y5 \
	VXORPS Y6, Y6, Y6 \
	VXORPS Y7, Y7, Y7 \
	SUBQ   $2, CX \
	JLT    odd \
lots: \
	FETCH(2*BYTES) \
	LOAD((SI), X8, Y8) \
	LOAD(BYTES(SI), X9, Y9) \
	VFMADD231PS (R8)(AX*1), Y8, Y0 \
	VFMADD231PS (R9)(AX*1), Y8, Y2 \
	VFMADD231PS (R10)(AX*1), Y8, Y4 \
	VFMADD231PS (R11)(AX*1), Y8, Y6 \
	VFMADD231PS 32(R8)(AX*1), Y9, Y1 \
	VFMADD231PS 32(R9)(AX*1), Y9, Y3 \
	VFMADD231PS 32(R10)(AX*1), Y9, Y5 \
	VFMADD231PS 32(R11)(AX*1), Y9, Y7 \
	ADDQ $(2*BYTES), SI \
	ADDQ $64, AX \
	SUBQ $2, CX \
	JGE  lots \
odd: \
	TESTQ $1, CX \
	JZ    sum \
	FETCH(BYTES) \
	LOAD((SI), X8, Y8) \
	VFMADD231PS (R8)(AX*1), Y8, Y0 \
	VFMADD231PS (R9)(AX*1), Y8, Y2 \
	VFMADD231PS (R10)(AX*1), Y8, Y4 \
	VFMADD231PS (R11)(AX*1), Y8, Y6 \
	ADDQ $BYTES, SI \
sum: \
	VADDPS Y1, Y0, Y0 \
	VADDPS Y3, Y2, Y2 \
	VADDPS Y5, Y4, Y4 \
	VADDPS Y7, Y6, Y6 \
	SUM4

// SUM4 adds up Y0, Y2, Y4 and Y6.
#define SUM4 \
	VHADDPS      Y2, Y0, Y0 \
	VHADDPS      Y6, Y4, Y4 \
	VHADDPS      Y4, Y0, Y0 \
	VEXTRACTF128 $1, Y0, X1 \
	VADDPS       X1, X0, X0

// WIDE4 is PRODUCTS4 with twice the lot and half as many.
#define WIDE4(LOAD, BYTES, FETCH) \
	XORQ  AX, AX \
	VPXORD Z0, Z0, Z0 \
	VPXORD Z1, Z1, Z1 \
	VPXORD Z2, Z2, Z2 \
	VPXORD Z3, Z3, Z3 \
	VPXORD Z4, Z4, Z4 \
	VPXORD Z5, Z5, Z5 \
	VPXORD Z6, Z6, Z6 \
	VPXORD Z7, Z7, Z7 \
	SUBQ  $4, CX \
	JLT   odd \
lots: \
	FETCH(2*BYTES) \
	LOAD((SI), Z8) \
	LOAD(BYTES(SI), Z9) \
	VFMADD231PS (R8)(AX*1), Z8, Z0 \
	VFMADD231PS (R9)(AX*1), Z8, Z2 \
	VFMADD231PS (R10)(AX*1), Z8, Z4 \
	VFMADD231PS (R11)(AX*1), Z8, Z6 \
	VFMADD231PS 64(R8)(AX*1), Z9, Z1 \
	VFMADD231PS 64(R9)(AX*1), Z9, Z3 \
	VFMADD231PS 64(R10)(AX*1), Z9, Z5 \
	VFMADD231PS 64(R11)(AX*1), Z9, Z7 \
	ADDQ $(2*BYTES), SI \
	ADDQ $128, AX \
	SUBQ $4, CX \
	JGE  lots \
odd: \
	TESTQ $2, CX \
	JZ    sum \
	FETCH(BYTES) \
	LOAD((SI), Z8) \
	VFMADD231PS (R8)(AX*1), Z8, Z0 \
	VFMADD231PS (R9)(AX*1), Z8, Z2 \
	VFMADD231PS (R10)(AX*1), Z8, Z4 \
	VFMADD231PS (R11)(AX*1), Z8, Z6 \
	ADDQ $BYTES, SI \
sum: \
	VADDPS        Z1, Z0, Z0 \
	VADDPS        Z3, Z2, Z2 \
	VADDPS        Z5, Z4, Z4 \
	VADDPS        Z7, Z6, Z6 \
	VEXTRACTF64X4 $1, Z0, Y1 \
	VEXTRACTF64X4 $1, Z2, Y3 \
	VEXTRACTF64X4 $1, Z4, Y5 \
	VEXTRACTF64X4 $1, Z6, Y7 \
	VADDPS        Y1, Y0, Y0 \
	VADDPS        Y3, Y2, Y2 \
	VADDPS        Y5, Y4, Y4 \
	VADDPS        Y7, Y6, Y6 \
	SUM4

// DOT4 multiplies each vector by 4 queries.
#define DOT4(SETUP, PRODUCTS, LOAD, BYTES, FETCH) \
	MOVQ a+0(FP), AX \
	MOVQ args_heads+0(AX), R8 \
	MOVQ args_heads+8(AX), R9 \
	MOVQ args_heads+16(AX), R10 \
	MOVQ args_heads+24(AX), R11 \
	MOVQ args_out+0(AX), BX \
	MOVQ args_out+8(AX), DI \
	MOVQ args_out+16(AX), R13 \
	MOVQ args_out+24(AX), R15 \
	MOVQ args_vectors(AX), R12 \
	XORQ DX, DX \
	SETUP \
vector: \
	NEXT1 \
	MOVQ args_lots(AX), CX \
	PRODUCTS(LOAD, BYTES, FETCH) \
	VMOVSS     X0, (BX)(DX*4) \
	VEXTRACTPS $1, X0, (DI)(DX*4) \
	VEXTRACTPS $2, X0, (R13)(DX*4) \
	VEXTRACTPS $3, X0, (R15)(DX*4) \
	INCQ DX \
	MOVQ a+0(FP), AX \
	CMPQ DX, args_n(AX) \
	JLT  vector \
	VZEROUPPER \
	RET

// PRODUCT1 is PRODUCTS4 for one query, and adds up in the same order. It uses DI in place of AX.
#define PRODUCT1(LOAD, BYTES, FETCH) \
	MOVQ   R8, DI \
	VXORPS Y0, Y0, Y0 \
	VXORPS Y1, Y1, Y1 \
	SUBQ   $2, CX \
	JLT    odd \
lots: \
	FETCH(2*BYTES) \
	LOAD((SI), X8, Y8) \
	LOAD(BYTES(SI), X9, Y9) \
	VFMADD231PS (DI), Y8, Y0 \
	VFMADD231PS 32(DI), Y9, Y1 \
	ADDQ $(2*BYTES), SI \
	ADDQ $64, DI \
	SUBQ $2, CX \
	JGE  lots \
odd: \
	TESTQ $1, CX \
	JZ    sum \
	FETCH(BYTES) \
	LOAD((SI), X8, Y8) \
	VFMADD231PS (DI), Y8, Y0 \
	ADDQ $BYTES, SI \
sum: \
	VADDPS Y1, Y0, Y0 \
	SUM1

// SUM1 adds up Y0.
#define SUM1 \
	VHADDPS      Y0, Y0, Y0 \
	VHADDPS      Y0, Y0, Y0 \
	VEXTRACTF128 $1, Y0, X1 \
	VADDSS       X1, X0, X0

// WIDE1 is PRODUCT1 with twice the lot and half as many.
#define WIDE1(LOAD, BYTES, FETCH) \
	MOVQ   R8, DI \
	VPXORD Z0, Z0, Z0 \
	VPXORD Z1, Z1, Z1 \
	SUBQ   $4, CX \
	JLT    odd \
lots: \
	FETCH(2*BYTES) \
	LOAD((SI), Z8) \
	LOAD(BYTES(SI), Z9) \
	VFMADD231PS (DI), Z8, Z0 \
	VFMADD231PS 64(DI), Z9, Z1 \
	ADDQ $(2*BYTES), SI \
	ADDQ $128, DI \
	SUBQ $4, CX \
	JGE  lots \
odd: \
	TESTQ $2, CX \
	JZ    sum \
	FETCH(BYTES) \
	LOAD((SI), Z8) \
	VFMADD231PS (DI), Z8, Z0 \
	ADDQ $BYTES, SI \
sum: \
	VADDPS        Z1, Z0, Z0 \
	VEXTRACTF64X4 $1, Z0, Y1 \
	VADDPS        Y1, Y0, Y0 \
	SUM1

// DOT1 is DOT4 for one query.
#define DOT1(SETUP, PRODUCT, LOAD, BYTES, FETCH) \
	MOVQ a+0(FP), AX \
	MOVQ args_heads+0(AX), R8 \
	MOVQ args_out+0(AX), BX \
	MOVQ args_vectors(AX), R12 \
	MOVQ args_n(AX), DX \
	SETUP \
vector: \
	NEXT1 \
	MOVQ args_lots(AX), CX \
	PRODUCT(LOAD, BYTES, FETCH) \
	VMOVSS X0, (BX) \
	ADDQ $4, BX \
	DECQ DX \
	JNZ  vector \
	VZEROUPPER \
	RET

// CODES4 multiplies vectors of codes that adjoin by 4 queries. Meanwhile memory is asked for others, a vector at a
// time: all of it at once would stop the arithmetic.
#define CODES4(SETUP, PRODUCTS, LOAD, BYTES) \
	MOVQ a+0(FP), AX \
	MOVQ codeArgs_heads+0(AX), R8 \
	MOVQ codeArgs_heads+8(AX), R9 \
	MOVQ codeArgs_heads+16(AX), R10 \
	MOVQ codeArgs_heads+24(AX), R11 \
	MOVQ codeArgs_out+0(AX), BX \
	MOVQ codeArgs_out+8(AX), DI \
	MOVQ codeArgs_out+16(AX), R13 \
	MOVQ codeArgs_out+24(AX), R15 \
	MOVQ codeArgs_codes(AX), SI \
	MOVQ codeArgs_params(AX), R12 \
	MOVQ codeArgs_next(AX), R14 \
	XORQ DX, DX \
	SETUP \
vector: \
	MOVQ       codeArgs_bytes(AX), CX \
	PREFETCHT1 (R14) \
	PREFETCHT1 -1(R14)(CX*1) \
	ADDQ       CX, R14 \
	MOVQ       codeArgs_lots(AX), CX \
	PRODUCTS(LOAD, BYTES, NO_FETCH) \
	MOVQ         a+0(FP), AX \
	VMOVUPS      codeArgs_sums(AX), X2 \
	VBROADCASTSS 4(R12)(DX*8), X3 \
	VFMADD213PS  codeArgs_constants(AX), X3, X2 \
	VBROADCASTSS (R12)(DX*8), X1 \
	VFMADD213PS  X2, X1, X0 \
	VEXTRACTPS   $3, X0, (R15)(DX*4) \
	VEXTRACTPS   $2, X0, (R13)(DX*4) \
	VEXTRACTPS   $1, X0, (DI)(DX*4) \
	VMOVSS       X0, (BX)(DX*4) \
	INCQ DX \
	CMPQ DX, codeArgs_n(AX) \
	JLT  vector \
	VZEROUPPER \
	RET

// CODES1 is CODES4 for one query.
#define CODES1(SETUP, PRODUCT, LOAD, BYTES) \
	MOVQ a+0(FP), AX \
	MOVQ codeArgs_heads+0(AX), R8 \
	MOVQ codeArgs_out+0(AX), BX \
	MOVQ codeArgs_codes(AX), SI \
	MOVQ codeArgs_params(AX), R12 \
	MOVQ codeArgs_next(AX), R14 \
	XORQ DX, DX \
	SETUP \
vector: \
	MOVQ       codeArgs_bytes(AX), CX \
	PREFETCHT1 (R14) \
	PREFETCHT1 -1(R14)(CX*1) \
	ADDQ       CX, R14 \
	MOVQ       codeArgs_lots(AX), CX \
	PRODUCT(LOAD, BYTES, NO_FETCH) \
	VMOVSS      codeArgs_sums(AX), X2 \
	VMOVSS      4(R12)(DX*8), X3 \
	VFMADD213SS codeArgs_constants(AX), X3, X2 \
	VFMADD132SS (R12)(DX*8), X2, X0 \
	VMOVSS      X0, (BX)(DX*4) \
	INCQ DX \
	CMPQ DX, codeArgs_n(AX) \
	JLT  vector \
	VZEROUPPER \
	RET

// WEIGH adds to SUM the vectors in Y8 to Y11, each times one of 4 weights.
#define WEIGH(W0, W1, W2, W3, SUM) \
	VBROADCASTSS W0, Y4 \
	VBROADCASTSS W1, Y5 \
	VBROADCASTSS W2, Y6 \
	VBROADCASTSS W3, Y7 \
	VFMADD231PS  Y4, Y8, SUM \
	VFMADD231PS  Y5, Y9, SUM \
	VFMADD231PS  Y6, Y10, SUM \
	VFMADD231PS  Y7, Y11, SUM

// ADD4 adds vectors, a multiple of 4, to 4 outs, one after another: 4 at a time save loads and stores. All
// outs are read before one is written, as some may be the same. SCALE is a float's size over an element's.
#define ADD4(SETUP, LOAD, BYTES, SCALE) \
	MOVQ a+0(FP), AX \
	MOVQ args_out+0(AX), BX \
	MOVQ args_out+8(AX), DI \
	MOVQ args_out+16(AX), R13 \
	MOVQ args_out+24(AX), R15 \
	MOVQ args_vectors(AX), R12 \
	MOVQ args_bytes(AX), CX \
	MOVQ CX, bytes-72(SP) \
	SETUP \
vectors: \
	MOVQ    args_heads+0(AX), R8 \
	MOVQ    args_heads+8(AX), R9 \
	MOVQ    args_heads+16(AX), R10 \
	MOVQ    args_heads+24(AX), R11 \
	VMOVUPS (R8), X4 \
	VMOVUPS (R9), X5 \
	VMOVUPS (R10), X6 \
	VMOVUPS (R11), X7 \
	VMOVUPS X4, w0-64(SP) \
	VMOVUPS X5, w4-48(SP) \
	VMOVUPS X6, w8-32(SP) \
	VMOVUPS X7, w12-16(SP) \
	ADDQ    $16, args_heads+0(AX) \
	ADDQ    $16, args_heads+8(AX) \
	ADDQ    $16, args_heads+16(AX) \
	ADDQ    $16, args_heads+24(AX) \
	NEXT4 \
	XORQ AX, AX \
lots: \
	FETCH4 \
	LOAD((SI)(AX*1), X8, Y8) \
	LOAD((CX)(AX*1), X9, Y9) \
	LOAD((DX)(AX*1), X10, Y10) \
	LOAD((R14)(AX*1), X11, Y11) \
	VMOVUPS (BX)(AX*SCALE), Y0 \
	VMOVUPS (DI)(AX*SCALE), Y1 \
	VMOVUPS (R13)(AX*SCALE), Y2 \
	VMOVUPS (R15)(AX*SCALE), Y3 \
	WEIGH(w0-64(SP), w1-60(SP), w2-56(SP), w3-52(SP), Y0) \
	WEIGH(w4-48(SP), w5-44(SP), w6-40(SP), w7-36(SP), Y1) \
	WEIGH(w8-32(SP), w9-28(SP), w10-24(SP), w11-20(SP), Y2) \
	WEIGH(w12-16(SP), w13-12(SP), w14-8(SP), w15-4(SP), Y3) \
	VMOVUPS Y0, (BX)(AX*SCALE) \
	VMOVUPS Y1, (DI)(AX*SCALE) \
	VMOVUPS Y2, (R13)(AX*SCALE) \
	VMOVUPS Y3, (R15)(AX*SCALE) \
	ADDQ $BYTES, AX \
	CMPQ AX, bytes-72(SP) \
	JLT  lots \
	MOVQ a+0(FP), AX \
	SUBQ $4, args_n(AX) \
	JGT  vectors \
	VZEROUPPER \
	RET

// ADD4WIDE is ADD4 with twice the lot, and keeps the weights in Z16 to Z31.
#define ADD4WIDE(LOAD, BYTES, SCALE) \
	MOVQ a+0(FP), AX \
	MOVQ args_out+0(AX), BX \
	MOVQ args_out+8(AX), DI \
	MOVQ args_out+16(AX), R13 \
	MOVQ args_out+24(AX), R15 \
	MOVQ args_vectors(AX), R12 \
	MOVQ args_bytes(AX), CX \
	MOVQ CX, bytes-8(SP) \
vectors: \
	MOVQ args_heads+0(AX), R8 \
	MOVQ args_heads+8(AX), R9 \
	MOVQ args_heads+16(AX), R10 \
	MOVQ args_heads+24(AX), R11 \
	WEIGHTS(R8, Z16, Z17, Z18, Z19) \
	WEIGHTS(R9, Z20, Z21, Z22, Z23) \
	WEIGHTS(R10, Z24, Z25, Z26, Z27) \
	WEIGHTS(R11, Z28, Z29, Z30, Z31) \
	ADDQ $16, args_heads+0(AX) \
	ADDQ $16, args_heads+8(AX) \
	ADDQ $16, args_heads+16(AX) \
	ADDQ $16, args_heads+24(AX) \
	NEXT4 \
	XORQ AX, AX \
lots: \
	FETCH4 \
	LOAD((SI)(AX*1), Z8) \
	LOAD((CX)(AX*1), Z9) \
	LOAD((DX)(AX*1), Z10) \
	LOAD((R14)(AX*1), Z11) \
	VMOVUPS (BX)(AX*SCALE), Z0 \
	VMOVUPS (DI)(AX*SCALE), Z1 \
	VMOVUPS (R13)(AX*SCALE), Z2 \
	VMOVUPS (R15)(AX*SCALE), Z3 \
	WEIGHWIDE(Z8, Z16, Z20, Z24, Z28) \
	WEIGHWIDE(Z9, Z17, Z21, Z25, Z29) \
	WEIGHWIDE(Z10, Z18, Z22, Z26, Z30) \
	WEIGHWIDE(Z11, Z19, Z23, Z27, Z31) \
	VMOVUPS Z0, (BX)(AX*SCALE) \
	VMOVUPS Z1, (DI)(AX*SCALE) \
	VMOVUPS Z2, (R13)(AX*SCALE) \
	VMOVUPS Z3, (R15)(AX*SCALE) \
	ADDQ $BYTES, AX \
	CMPQ AX, bytes-8(SP) \
	JLT  lots \
	MOVQ a+0(FP), AX \
	SUBQ $4, args_n(AX) \
	JGT  vectors \
	VZEROUPPER \
	RET

// WEIGHTS loads a head's weights for 4 vectors.
#define WEIGHTS(AT, W0, W1, W2, W3) \
	VBROADCASTSS 0(AT), W0 \
	VBROADCASTSS 4(AT), W1 \
	VBROADCASTSS 8(AT), W2 \
	VBROADCASTSS 12(AT), W3

// WEIGHWIDE adds a vector to Z0 to Z3, times a weight each.
#define WEIGHWIDE(VECTOR, W0, W1, W2, W3) \
	VFMADD231PS W0, VECTOR, Z0 \
	VFMADD231PS W1, VECTOR, Z1 \
	VFMADD231PS W2, VECTOR, Z2 \
	VFMADD231PS W3, VECTOR, Z3

// ADD1 is ADD4 for one out.
#define ADD1(SETUP, LOAD, BYTES, SCALE) \
	MOVQ a+0(FP), AX \
	MOVQ args_heads+0(AX), R13 \
	MOVQ args_out+0(AX), BX \
	MOVQ args_vectors(AX), R12 \
	MOVQ args_bytes(AX), DI \
	MOVQ args_n(AX), R15 \
	SETUP \
vectors: \
	NEXT4 \
	XORQ AX, AX \
lots: \
	FETCH4 \
	LOAD((SI)(AX*1), X8, Y8) \
	LOAD((CX)(AX*1), X9, Y9) \
	LOAD((DX)(AX*1), X10, Y10) \
	LOAD((R14)(AX*1), X11, Y11) \
	VMOVUPS (BX)(AX*SCALE), Y0 \
	WEIGH((R13), 4(R13), 8(R13), 12(R13), Y0) \
	VMOVUPS Y0, (BX)(AX*SCALE) \
	ADDQ $BYTES, AX \
	CMPQ AX, DI \
	JLT  lots \
	ADDQ $16, R13 \
	MOVQ a+0(FP), AX \
	SUBQ $4, R15 \
	JGT  vectors \
	VZEROUPPER \
	RET

// DECODE writes lots of elements as floats.
#define DECODE(SETUP, LOAD, BYTES) \
	MOVQ dst+0(FP), DI \
	MOVQ src+8(FP), SI \
	MOVQ lots+16(FP), CX \
	SETUP \
lots: \
	LOAD((SI), X8, Y8) \
	VMOVUPS Y8, (DI) \
	ADDQ $BYTES, SI \
	ADDQ $32, DI \
	DECQ CX \
	JNZ  lots \
	VZEROUPPER \
	RET

// QUARTERS adds up 4 vectors as far as their quarters: each of A's holds a sum of each.
#define QUARTERS(A, B, C, D) \
	VUNPCKLPS B, A, Z0 \
	VUNPCKHPS B, A, Z1 \
	VUNPCKLPS D, C, Z2 \
	VUNPCKHPS D, C, Z3 \
	VADDPS    Z1, Z0, Z0 \
	VADDPS    Z3, Z2, Z2 \
	VUNPCKLPD Z2, Z0, Z1 \
	VUNPCKHPD Z2, Z0, Z3 \
	VADDPS    Z3, Z1, A

// func dot4F32(a *args)
TEXT ·dot4F32(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, PRODUCTS4, LOAD_F32, 32, FETCH)

// func dot4F16(a *args)
TEXT ·dot4F16(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, PRODUCTS4, LOAD_F16, 16, FETCH)

// func dot4BF16(a *args)
TEXT ·dot4BF16(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, PRODUCTS4, LOAD_BF16, 16, FETCH)

// func dot4F32Wide(a *args)
TEXT ·dot4F32Wide(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, WIDE4, LOAD_F32WIDE, 64, FETCH_LINES)

// func dot4F16Wide(a *args)
TEXT ·dot4F16Wide(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, WIDE4, LOAD_F16WIDE, 32, FETCH)

// func dot4BF16Wide(a *args)
TEXT ·dot4BF16Wide(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, WIDE4, LOAD_BF16WIDE, 32, FETCH)

// func dot4F8(a *args)
TEXT ·dot4F8(SB), NOSPLIT, $0-8
	DOT4(SETUP_F8, PRODUCTS4, LOAD_F8, 8, FETCH)

// func dot1F32(a *args)
TEXT ·dot1F32(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, PRODUCT1, LOAD_F32, 32, FETCH)

// func dot1F16(a *args)
TEXT ·dot1F16(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, PRODUCT1, LOAD_F16, 16, FETCH)

// func dot1BF16(a *args)
TEXT ·dot1BF16(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, PRODUCT1, LOAD_BF16, 16, FETCH)

// func dot1F32Wide(a *args)
TEXT ·dot1F32Wide(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, WIDE1, LOAD_F32WIDE, 64, FETCH_LINES)

// func dot1F16Wide(a *args)
TEXT ·dot1F16Wide(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, WIDE1, LOAD_F16WIDE, 32, FETCH)

// func dot1BF16Wide(a *args)
TEXT ·dot1BF16Wide(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, WIDE1, LOAD_BF16WIDE, 32, FETCH)

// func dot1F8(a *args)
TEXT ·dot1F8(SB), NOSPLIT, $0-8
	DOT1(SETUP_F8, PRODUCT1, LOAD_F8, 8, FETCH)

// func codes1U2(a *codeArgs)
TEXT ·codes1U2(SB), NOSPLIT, $0-8
	CODES1(SETUP_U2, PRODUCT1, LOAD_U2, 2)

// func codes1U4(a *codeArgs)
TEXT ·codes1U4(SB), NOSPLIT, $0-8
	CODES1(SETUP_U4, PRODUCT1, LOAD_U4, 4)

// func codes1U8(a *codeArgs)
TEXT ·codes1U8(SB), NOSPLIT, $0-8
	CODES1(NO_SETUP, PRODUCT1, LOAD_U8, 8)

// func codes4U2(a *codeArgs)
TEXT ·codes4U2(SB), NOSPLIT, $0-8
	CODES4(SETUP_U2, PRODUCTS4, LOAD_U2, 2)

// func codes4U4(a *codeArgs)
TEXT ·codes4U4(SB), NOSPLIT, $0-8
	CODES4(SETUP_U4, PRODUCTS4, LOAD_U4, 4)

// func codes4U8(a *codeArgs)
TEXT ·codes4U8(SB), NOSPLIT, $0-8
	CODES4(NO_SETUP, PRODUCTS4, LOAD_U8, 8)

// func codes1U4Wide(a *codeArgs)
TEXT ·codes1U4Wide(SB), NOSPLIT, $0-8
	CODES1(SETUP_U4WIDE, WIDE1, LOAD_U4WIDE, 8)

// func codes4U4Wide(a *codeArgs)
//
// It is CODES4, 4 vectors at a time: Z16 to Z19 are sums for the first query and these, and so on. In place of
// vectors behind the last one it takes an earlier one, and writes nothing.
TEXT ·codes4U4Wide(SB), NOSPLIT, $0-8
	MOVQ a+0(FP), AX
	MOVQ codeArgs_heads+0(AX), R8
	MOVQ codeArgs_heads+8(AX), R9
	MOVQ codeArgs_heads+16(AX), R10
	MOVQ codeArgs_heads+24(AX), R11
	MOVQ codeArgs_codes(AX), SI
	MOVQ codeArgs_params(AX), R12
	MOVQ codeArgs_next(AX), R14
	XORQ DX, DX
	SETUP_U4WIDE
	VMOVDQU32       quarters<>(SB), Z0
	VBROADCASTF32X4 codeArgs_sums(AX), Z12
	VBROADCASTF32X4 codeArgs_constants(AX), Z13
	VPERMPS         Z12, Z0, Z12
	VPERMPS         Z13, Z0, Z13
vectors:
	MOVQ    codeArgs_bytes(AX), CX
	LEAQ    (SI)(CX*1), DI
	LEAQ    (SI)(CX*2), R13
	LEAQ    (DI)(CX*2), R15
	MOVQ    codeArgs_n(AX), BX
	SUBQ    DX, BX
	MOVL    $4, AX
	CMPQ    BX, AX
	CMOVQGT AX, BX
	CMPQ    BX, AX
	CMOVQLT SI, R15
	CMPQ    BX, $2
	CMOVQLE SI, R13
	CMOVQLT SI, DI
	MOVL    $0xf, AX
	BZHIL   BX, AX, AX
	KMOVW   AX, K1
	ADDL    BX, BX
	MOVL    $0xff, AX
	BZHIL   BX, AX, AX
	KMOVW   AX, K2
	LEAQ    (R14)(CX*2), BX
	PREFETCHT1 (R14)
	PREFETCHT1 (R14)(CX*1)
	PREFETCHT1 (BX)
	PREFETCHT1 (BX)(CX*1)
	LEAQ    (BX)(CX*2), R14
	PREFETCHT1 -1(R14)
	XORQ    AX, AX
	VPXORD  Z16, Z16, Z16
	VPXORD  Z17, Z17, Z17
	VPXORD  Z18, Z18, Z18
	VPXORD  Z19, Z19, Z19
	VPXORD  Z20, Z20, Z20
	VPXORD  Z21, Z21, Z21
	VPXORD  Z22, Z22, Z22
	VPXORD  Z23, Z23, Z23
	VPXORD  Z24, Z24, Z24
	VPXORD  Z25, Z25, Z25
	VPXORD  Z26, Z26, Z26
	VPXORD  Z27, Z27, Z27
	VPXORD  Z28, Z28, Z28
	VPXORD  Z29, Z29, Z29
	VPXORD  Z30, Z30, Z30
	VPXORD  Z31, Z31, Z31
lots:
	VMOVUPS (R8)(AX*8), Z4
	VMOVUPS (R9)(AX*8), Z5
	VMOVUPS (R10)(AX*8), Z6
	VMOVUPS (R11)(AX*8), Z7
	LOAD_U4WIDE((SI)(AX*1), Z0)
	LOAD_U4WIDE((DI)(AX*1), Z1)
	LOAD_U4WIDE((R13)(AX*1), Z2)
	LOAD_U4WIDE((R15)(AX*1), Z3)
	VFMADD231PS Z0, Z4, Z16
	VFMADD231PS Z0, Z5, Z20
	VFMADD231PS Z0, Z6, Z24
	VFMADD231PS Z0, Z7, Z28
	VFMADD231PS Z1, Z4, Z17
	VFMADD231PS Z1, Z5, Z21
	VFMADD231PS Z1, Z6, Z25
	VFMADD231PS Z1, Z7, Z29
	VFMADD231PS Z2, Z4, Z18
	VFMADD231PS Z2, Z5, Z22
	VFMADD231PS Z2, Z6, Z26
	VFMADD231PS Z2, Z7, Z30
	VFMADD231PS Z3, Z4, Z19
	VFMADD231PS Z3, Z5, Z23
	VFMADD231PS Z3, Z6, Z27
	VFMADD231PS Z3, Z7, Z31
	ADDQ $8, AX
	CMPQ AX, CX
	JLT  lots
	LEAQ (SI)(CX*4), SI
	QUARTERS(Z16, Z17, Z18, Z19)
	QUARTERS(Z20, Z21, Z22, Z23)
	QUARTERS(Z24, Z25, Z26, Z27)
	QUARTERS(Z28, Z29, Z30, Z31)
	VSHUFF32X4 $0x44, Z20, Z16, Z0
	VSHUFF32X4 $0xee, Z20, Z16, Z1
	VSHUFF32X4 $0x44, Z28, Z24, Z2
	VSHUFF32X4 $0xee, Z28, Z24, Z3
	VADDPS     Z1, Z0, Z0
	VADDPS     Z3, Z2, Z2
	VSHUFF32X4 $0x88, Z2, Z0, Z1
	VSHUFF32X4 $0xdd, Z2, Z0, Z3
	VADDPS     Z3, Z1, Z0
	VMOVUPS.Z   (R12)(DX*8), K2, Z1
	VMOVDQU32   pairs<>(SB), Z2
	VMOVDQU32   pairs<>+64(SB), Z3
	VPERMPS     Z1, Z2, Z2
	VPERMPS     Z1, Z3, Z3
	VFMADD213PS Z13, Z12, Z3
	VFMADD213PS Z3, Z2, Z0
	MOVQ a+0(FP), AX
	MOVQ codeArgs_out+24(AX), BX
	VEXTRACTF32X4 $3, Z0, K1, (BX)(DX*4)
	MOVQ codeArgs_out+16(AX), BX
	VEXTRACTF32X4 $2, Z0, K1, (BX)(DX*4)
	MOVQ codeArgs_out+8(AX), BX
	VEXTRACTF32X4 $1, Z0, K1, (BX)(DX*4)
	MOVQ codeArgs_out+0(AX), BX
	VEXTRACTF32X4 $0, Z0, K1, (BX)(DX*4)
	ADDQ $4, DX
	CMPQ DX, codeArgs_n(AX)
	JLT  vectors
	VZEROUPPER
	RET

// func add4F32(a *args)
TEXT ·add4F32(SB), NOSPLIT, $72-8
	ADD4(NO_SETUP, LOAD_F32, 32, 1)

// func add4F16(a *args)
TEXT ·add4F16(SB), NOSPLIT, $72-8
	ADD4(NO_SETUP, LOAD_F16, 16, 2)

// func add4BF16(a *args)
TEXT ·add4BF16(SB), NOSPLIT, $72-8
	ADD4(NO_SETUP, LOAD_BF16, 16, 2)

// func add4F8(a *args)
TEXT ·add4F8(SB), NOSPLIT, $72-8
	ADD4(SETUP_F8, LOAD_F8, 8, 4)

// func add4F32Wide(a *args)
TEXT ·add4F32Wide(SB), NOSPLIT, $8-8
	ADD4WIDE(LOAD_F32WIDE, 64, 1)

// func add4F16Wide(a *args)
TEXT ·add4F16Wide(SB), NOSPLIT, $8-8
	ADD4WIDE(LOAD_F16WIDE, 32, 2)

// func add4BF16Wide(a *args)
TEXT ·add4BF16Wide(SB), NOSPLIT, $8-8
	ADD4WIDE(LOAD_BF16WIDE, 32, 2)

// func add1F32(a *args)
TEXT ·add1F32(SB), NOSPLIT, $0-8
	ADD1(NO_SETUP, LOAD_F32, 32, 1)

// func add1F16(a *args)
TEXT ·add1F16(SB), NOSPLIT, $0-8
	ADD1(NO_SETUP, LOAD_F16, 16, 2)

// func add1BF16(a *args)
TEXT ·add1BF16(SB), NOSPLIT, $0-8
	ADD1(NO_SETUP, LOAD_BF16, 16, 2)

// func add1F8(a *args)
TEXT ·add1F8(SB), NOSPLIT, $0-8
	ADD1(SETUP_F8, LOAD_F8, 8, 4)

// func decodeF16Lots(dst *float32, src *byte, lots int)
TEXT ·decodeF16Lots(SB), NOSPLIT, $0-24
	DECODE(NO_SETUP, LOAD_F16, 16)

// func decodeBF16Lots(dst *float32, src *byte, lots int)
TEXT ·decodeBF16Lots(SB), NOSPLIT, $0-24
	DECODE(NO_SETUP, LOAD_BF16, 16)

// func decodeF8Lots(dst *float32, src *byte, lots int)
TEXT ·decodeF8Lots(SB), NOSPLIT, $0-24
	DECODE(SETUP_F8, LOAD_F8, 8)

// func fetch(p *byte, n int)
TEXT ·fetch(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), AX
	MOVQ n+8(FP), CX
lines:
	PREFETCHT1 (AX)
	ADDQ       $64, AX
	SUBQ       $64, CX
	JGT        lines
	RET

// func atLeastLots(dst *int32, x *float32, least float32, lots int) int
TEXT ·atLeastLots(SB), NOSPLIT, $0-40
	MOVQ         dst+0(FP), DI
	MOVQ         x+8(FP), SI
	MOVQ         lots+24(FP), CX
	VBROADCASTSS least+16(FP), Y0
	MOVL         $8, AX
	VMOVD        AX, X1
	VPBROADCASTD X1, Y1
	VPXOR        Y2, Y2, Y2
	LEAQ         ·places(SB), R8
	XORQ         DX, DX
lots:
	VCMPPS    $2, (SI), Y0, Y3 // least <= x
	VMOVMSKPS Y3, AX
	VPMOVZXBD (R8)(AX*8), Y4
	VPADDD    Y2, Y4, Y4
	VMOVDQU   Y4, (DI)(DX*4)
	POPCNTL   AX, AX
	ADDQ      AX, DX
	VPADDD    Y1, Y2, Y2
	ADDQ      $32, SI
	DECQ      CX
	JNZ       lots
	MOVQ      DX, ret+32(FP)
	VZEROUPPER
	RET
