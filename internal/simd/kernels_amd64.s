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

// While a vector is worked on, another one NEAR behind it in the list is asked of memory, and the first line
// of one FAR behind: its page may be new to the processor, which has to look up where it is, and then goes
// ahead by itself. Both go to the second cache, as vectors of one head may compete for few places in the
// first. These macros use R14 and want AX to point to args, R12 into the list.
#define HEADER 24
#define NEAR (20*HEADER)
#define FAR (32*HEADER)

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

// NEXT1 points SI to the next vector. It uses CX, too.
#define NEXT1 \
	FETCH_FAR(0) \
	FIND_NEAR(0, R14) \
	MOVQ args_bytes(AX), CX \
fetch: \
	PREFETCHT1 -1(R14)(CX*1) \
	SUBQ       $64, CX \
	JGT        fetch \
	MOVQ       (R12), SI \
	ADDQ       $HEADER, R12

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

// DOT4 multiplies each vector by 4 queries. Elements 0-7 and 8-15 of each 16 have sums of their own: 8
// sums, as many as two multipliers have in flight.
#define DOT4(SETUP, LOAD, BYTES) \
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
	MOVQ   args_lots(AX), CX \
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
	LOAD((SI), X8, Y8) \
	VFMADD231PS (R8)(AX*1), Y8, Y0 \
	VFMADD231PS (R9)(AX*1), Y8, Y2 \
	VFMADD231PS (R10)(AX*1), Y8, Y4 \
	VFMADD231PS (R11)(AX*1), Y8, Y6 \
sum: \
	VADDPS       Y1, Y0, Y0 \
	VADDPS       Y3, Y2, Y2 \
	VADDPS       Y5, Y4, Y4 \
	VADDPS       Y7, Y6, Y6 \
	VHADDPS      Y2, Y0, Y0 \
	VHADDPS      Y6, Y4, Y4 \
	VHADDPS      Y4, Y0, Y0 \
	VEXTRACTF128 $1, Y0, X1 \
	VADDPS       X1, X0, X0 \
	VMOVSS       X0, (BX)(DX*4) \
	VEXTRACTPS   $1, X0, (DI)(DX*4) \
	VEXTRACTPS   $2, X0, (R13)(DX*4) \
	VEXTRACTPS   $3, X0, (R15)(DX*4) \
	INCQ DX \
	MOVQ a+0(FP), AX \
	CMPQ DX, args_n(AX) \
	JLT  vector \
	VZEROUPPER \
	RET

// DOT1 is DOT4 for one query, and adds up in the same order.
#define DOT1(SETUP, LOAD, BYTES) \
	MOVQ a+0(FP), AX \
	MOVQ args_heads+0(AX), R8 \
	MOVQ args_out+0(AX), BX \
	MOVQ args_vectors(AX), R12 \
	MOVQ args_n(AX), DX \
	SETUP \
vector: \
	NEXT1 \
	MOVQ   args_lots(AX), CX \
	MOVQ   R8, DI \
	VXORPS Y0, Y0, Y0 \
	VXORPS Y1, Y1, Y1 \
	SUBQ   $2, CX \
	JLT    odd \
lots: \
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
	LOAD((SI), X8, Y8) \
	VFMADD231PS (DI), Y8, Y0 \
sum: \
	VADDPS       Y1, Y0, Y0 \
	VHADDPS      Y0, Y0, Y0 \
	VHADDPS      Y0, Y0, Y0 \
	VEXTRACTF128 $1, Y0, X1 \
	VADDSS       X1, X0, X0 \
	VMOVSS       X0, (BX) \
	ADDQ $4, BX \
	DECQ DX \
	JNZ  vector \
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

// func dot4F32(a *args)
TEXT ·dot4F32(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, LOAD_F32, 32)

// func dot4F16(a *args)
TEXT ·dot4F16(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, LOAD_F16, 16)

// func dot4BF16(a *args)
TEXT ·dot4BF16(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, LOAD_BF16, 16)

// func dot4F8(a *args)
TEXT ·dot4F8(SB), NOSPLIT, $0-8
	DOT4(SETUP_F8, LOAD_F8, 8)

// func dot4U8(a *args)
TEXT ·dot4U8(SB), NOSPLIT, $0-8
	DOT4(NO_SETUP, LOAD_U8, 8)

// func dot4U4(a *args)
TEXT ·dot4U4(SB), NOSPLIT, $0-8
	DOT4(SETUP_U4, LOAD_U4, 4)

// func dot4U2(a *args)
TEXT ·dot4U2(SB), NOSPLIT, $0-8
	DOT4(SETUP_U2, LOAD_U2, 2)

// func dot1F32(a *args)
TEXT ·dot1F32(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, LOAD_F32, 32)

// func dot1F16(a *args)
TEXT ·dot1F16(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, LOAD_F16, 16)

// func dot1BF16(a *args)
TEXT ·dot1BF16(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, LOAD_BF16, 16)

// func dot1F8(a *args)
TEXT ·dot1F8(SB), NOSPLIT, $0-8
	DOT1(SETUP_F8, LOAD_F8, 8)

// func dot1U8(a *args)
TEXT ·dot1U8(SB), NOSPLIT, $0-8
	DOT1(NO_SETUP, LOAD_U8, 8)

// func dot1U4(a *args)
TEXT ·dot1U4(SB), NOSPLIT, $0-8
	DOT1(SETUP_U4, LOAD_U4, 4)

// func dot1U2(a *args)
TEXT ·dot1U2(SB), NOSPLIT, $0-8
	DOT1(SETUP_U2, LOAD_U2, 2)

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

// func fetch(p *byte)
TEXT ·fetch(SB), NOSPLIT, $0-8
	MOVQ       p+0(FP), AX
	PREFETCHT0 (AX)
	RET
