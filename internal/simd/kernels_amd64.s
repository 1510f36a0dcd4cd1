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

// FETCH asks for the vector that is NEAR slice headers behind R12, and for the first line of the one that is
// FAR behind: its page may be new to the processor, which looks up the address and then goes ahead by
// itself. Both go to the second cache, as vectors of one head may compete for few places in the first. AX
// points to args; CX and R14 are lost.
#define HEADER 24
#define NEAR (16*HEADER)
#define FAR (64*HEADER)

#define FETCH(LINE) \
	LEAQ       FAR(R12), R14 \
	CMPQ       R14, args_last(AX) \
	CMOVQHI    args_last(AX), R14 \
	MOVQ       (R14), R14 \
	PREFETCHT2 (R14) \
	LEAQ       NEAR(R12), R14 \
	CMPQ       R14, args_last(AX) \
	CMOVQHI    args_last(AX), R14 \
	MOVQ       (R14), R14 \
	MOVQ       args_bytes(AX), CX \
LINE: \
	PREFETCHT1 -1(R14)(CX*1) \
	SUBQ       $64, CX \
	JGT        LINE

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
	FETCH(line) \
	MOVQ   (R12), SI \
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
	ADDQ $HEADER, R12 \
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
	FETCH(line) \
	MOVQ   (R12), SI \
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
	ADDQ $HEADER, R12 \
	ADDQ $4, BX \
	DECQ DX \
	JNZ  vector \
	VZEROUPPER \
	RET

// WEIGH adds to SUM the vectors in Y8 to Y11, each times one of the 4 weights at W.
#define WEIGH(W, SUM) \
	VBROADCASTSS (W), Y4 \
	VBROADCASTSS 4(W), Y5 \
	VBROADCASTSS 8(W), Y6 \
	VBROADCASTSS 12(W), Y7 \
	VFMADD231PS  Y4, Y8, SUM \
	VFMADD231PS  Y5, Y9, SUM \
	VFMADD231PS  Y6, Y10, SUM \
	VFMADD231PS  Y7, Y11, SUM

// ADD4 adds vectors, a multiple of 4, to 4 outs, one after another: 4 at a time save loads and stores. All
// outs are read before one is written, as some may be the same. SCALE is a float's size over an element's.
#define ADD4(SETUP, LOAD, BYTES, SCALE) \
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
	SETUP \
vectors: \
	FETCH(line0) \
	ADDQ $HEADER, R12 \
	FETCH(line1) \
	ADDQ $HEADER, R12 \
	FETCH(line2) \
	ADDQ $HEADER, R12 \
	FETCH(line3) \
	MOVQ (-3*HEADER)(R12), SI \
	MOVQ (-2*HEADER)(R12), CX \
	MOVQ (-1*HEADER)(R12), DX \
	MOVQ (R12), R14 \
	ADDQ $HEADER, R12 \
	MOVQ args_bytes(AX), AX \
lots: \
	LOAD(-BYTES(SI)(AX*1), X8, Y8) \
	LOAD(-BYTES(CX)(AX*1), X9, Y9) \
	LOAD(-BYTES(DX)(AX*1), X10, Y10) \
	LOAD(-BYTES(R14)(AX*1), X11, Y11) \
	VMOVUPS -32(BX)(AX*SCALE), Y0 \
	VMOVUPS -32(DI)(AX*SCALE), Y1 \
	VMOVUPS -32(R13)(AX*SCALE), Y2 \
	VMOVUPS -32(R15)(AX*SCALE), Y3 \
	WEIGH(R8, Y0) \
	WEIGH(R9, Y1) \
	WEIGH(R10, Y2) \
	WEIGH(R11, Y3) \
	VMOVUPS Y0, -32(BX)(AX*SCALE) \
	VMOVUPS Y1, -32(DI)(AX*SCALE) \
	VMOVUPS Y2, -32(R13)(AX*SCALE) \
	VMOVUPS Y3, -32(R15)(AX*SCALE) \
	SUBQ $BYTES, AX \
	JNZ  lots \
	ADDQ $16, R8 \
	ADDQ $16, R9 \
	ADDQ $16, R10 \
	ADDQ $16, R11 \
	MOVQ a+0(FP), AX \
	SUBQ $4, args_n(AX) \
	JGT  vectors \
	VZEROUPPER \
	RET

// ADD1 is ADD4 for one out.
#define ADD1(SETUP, LOAD, BYTES, SCALE) \
	MOVQ a+0(FP), AX \
	MOVQ args_heads+0(AX), R8 \
	MOVQ args_out+0(AX), BX \
	MOVQ args_vectors(AX), R12 \
	SETUP \
vectors: \
	FETCH(line0) \
	ADDQ $HEADER, R12 \
	FETCH(line1) \
	ADDQ $HEADER, R12 \
	FETCH(line2) \
	ADDQ $HEADER, R12 \
	FETCH(line3) \
	MOVQ (-3*HEADER)(R12), SI \
	MOVQ (-2*HEADER)(R12), CX \
	MOVQ (-1*HEADER)(R12), DX \
	MOVQ (R12), R14 \
	ADDQ $HEADER, R12 \
	MOVQ args_bytes(AX), DI \
lots: \
	LOAD(-BYTES(SI)(DI*1), X8, Y8) \
	LOAD(-BYTES(CX)(DI*1), X9, Y9) \
	LOAD(-BYTES(DX)(DI*1), X10, Y10) \
	LOAD(-BYTES(R14)(DI*1), X11, Y11) \
	VMOVUPS -32(BX)(DI*SCALE), Y0 \
	WEIGH(R8, Y0) \
	VMOVUPS Y0, -32(BX)(DI*SCALE) \
	SUBQ $BYTES, DI \
	JNZ  lots \
	ADDQ $16, R8 \
	SUBQ $4, args_n(AX) \
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
TEXT ·add4F32(SB), NOSPLIT, $0-8
	ADD4(NO_SETUP, LOAD_F32, 32, 1)

// func add4F16(a *args)
TEXT ·add4F16(SB), NOSPLIT, $0-8
	ADD4(NO_SETUP, LOAD_F16, 16, 2)

// func add4BF16(a *args)
TEXT ·add4BF16(SB), NOSPLIT, $0-8
	ADD4(NO_SETUP, LOAD_BF16, 16, 2)

// func add4F8(a *args)
TEXT ·add4F8(SB), NOSPLIT, $0-8
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
